"""F6 to F8: gone on with again and again, on other numbers of processes, and not with another run's settings."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.suite.processes import driven, start, torchrun
from tests.faults.suite.project import EXACT, KINDS, STEPS, resumed_from
from tests.faults.suite.tries import Lab, NotBuilt, Survived, Try

INTERRUPTED, REFUSED = 3, 2


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """Chains over every step, with signals and with kills; 1 and 2 processes; every kind of changed setting."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    for kind in [] if short else kinds:
        yield Try("F6", f"{kind}: stopped in every step in turn", lambda lab, k=kind: every_step(lab, k), STEPS - 1)
    for kind in kinds[1:2] if short else kinds:
        micro = [draw.randint(1, 3) for _ in range(3 if short else STEPS)]
        yield Try(
            "F6",
            f"{kind}: killed in a drawn micro-batch of every second step",
            lambda lab, k=kind, m=micro: micro_batches(lab, k, m),
            len(micro),
        )
    for kind in [] if short else kinds:
        yield Try("F6", f"{kind}: batch_tokens, killed at the end of an epoch", lambda lab, k=kind: packed(lab, k))
    if not short:
        yield Try("F7", "1, then 2, then 1 processes", lambda lab: worlds(lab, "lora", (1, 2, 1), "ddp"))
        yield Try("F7", "2, then 1, then 2 processes, whole model", lambda lab: worlds(lab, "full", (2, 1, 2), "ddp"))
        yield Try("F7", "2 fully sharded, then 1, then 2 fully sharded", lambda lab: worlds(lab, "full", (2, 1, 2), "fsdp"))
        yield Try("F7", "2 and 2 processes, with dropout: bit-equal", same_world)
    for key, before, now, words in CHANGES[:2] if short else CHANGES:
        yield Try("F8", f"{key} changed", lambda lab, k=key, b=before, n=now, w=words: changed(lab, k, b, n, w))
    yield Try("F8", "rows changed", rows)
    yield Try("F8", "tokenizer changed", tokenizer)
    yield Try("F8", "a change that was meant: resume=force", forced)


CHANGES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("train.seed", "42", "43", ("train.seed", "42", "43")),
    ("train.precision", "float32", "bfloat16", ("train.precision", "float32", "bfloat16")),
    ("model.chat_template", "null", "chatml", ("chat_template",)),
    ("train.optimizer", "adamw", "lion", ("train.optimizer", "adamw", "lion")),
    ("train.learning_rate", "0.01", "0.02", ("train.learning_rate", "0.01", "0.02")),
    ("train.batch_size", "7", "8", ("train.batch_size", "7", "8")),
    ("adapter.rank", "4", "8", ("adapter.rank", "4", "8")),
    ("adapter.dropout", "0.1", "0.2", ("adapter.dropout", "0.1", "0.2")),
    ("data.max_length", "96", "64", ("data.max_length", "96", "64")),
    ("data.shuffle", "true", "false", ("data.shuffle",)),
    ("data.train_on", "assistant", "all", ("data.train_on", "assistant", "all")),
    ("train.schedule", "cosine", "linear", ("train.schedule", "cosine", "linear")),
)


def every_step(lab: Lab, kind: str) -> Survived:
    """Each process does one step, is told to stop, and the next one goes on."""
    reference = lab.reference(kind)
    project = lab.project(kind)
    for step in range(1, STEPS):
        ended = project.train({"at": "update", "do": "signal:SIGTERM"}).expect(INTERRUPTED)
        assert project.steps_logged == step
        assert resumed_from(ended.said) == (step - 1 or None)
    project.train().expect(0)
    project.finished().assert_equal(reference)
    project.assert_tidy()
    return Survived(equal=True)


def micro_batches(lab: Lab, kind: str, micro: Sequence[int]) -> Survived:
    """Killed in the middle of accumulating: some of a step's gradient is there and must not count."""
    overrides = ("save.every=1st",)
    reference = lab.reference(kind, *overrides)
    project = lab.project(kind, *overrides)
    kills = 0
    for number in micro:
        ended = project.train({"at": "step", "number": 4 + number, "do": "kill"}).expect(-signal.SIGKILL, 0)
        kills += ended.code != 0
    assert kills >= 3
    project.train().expect(0)
    project.finished().assert_equal(reference)
    return Survived(equal=True)


def packed(lab: Lab, kind: str) -> Survived:
    """Steps of so many tokens, examples packed into rows over the whole epoch; killed in each step around its end."""
    overrides = ("train.batch_size=null", "train.batch_tokens=256", "save.every=1st")
    reference = lab.reference(kind, *overrides)
    project = lab.project(kind, *overrides)
    for step in range(4, 9):  # an epoch has five or six
        project.train({"at": "update", "step": step, "do": "kill"}).expect(-signal.SIGKILL)
    project.train().expect(0)
    project.finished().assert_equal(reference)
    return Survived(equal=True)


def worlds(lab: Lab, kind: str, sizes: Sequence[int], strategy: str) -> Survived:
    """Killed and gone on with by another number of processes: the same examples in each step, the same loss up to rounding."""
    overrides = [word for word in EXACT if kind == "lora" or not word.startswith("adapter")]
    overrides += ["train.precision=float32"]
    reference = lab.reference(kind, *overrides)
    project = lab.project(kind, *overrides)
    more: list[str] = []
    if strategy != "ddp":
        _need_strategy(strategy)
        more = [f"parallel.strategy={strategy}"]
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        faults = [] if last else [{"at": "update", "step": 5 * (number + 1), "do": "kill"}]
        words = driven(faults, "train", "run.yaml", *overrides, *(more if size > 1 else ()))
        if size > 1:
            start(torchrun(size, *words), project.folder).wait().expect(0 if last else 1)
        else:
            project.train(*faults, overrides=overrides).expect(0 if last else -signal.SIGKILL)
    project.finished().assert_close(reference)
    return Survived(lost=1, equal=True)


def same_world(lab: Lab) -> Survived:
    """Each rank has its own dropout, and goes on with it."""
    projects = [lab.project("lora") for _ in range(2)]
    step = [{"at": "update", "step": 6, "rank": 1, "do": "kill"}]
    start(torchrun(2, *driven(step, "train", "run.yaml")), projects[0].folder).wait().expect(1)
    for project in projects:
        start(torchrun(2, *driven([], "train", "run.yaml")), project.folder).wait().expect(0)
    projects[0].finished().assert_equal(projects[1].finished())
    return Survived(lost=1, equal=True)


def changed(lab: Lab, key: str, before: str, now: str, words: Sequence[str]) -> Survived:
    """Refused before anything is loaded or written, with what it was and what it is; put back, the run goes on."""
    project = lab.half("lora")
    picture = project.picture()
    project.train(overrides=[f"{key}={now}"]).expect(REFUSED).expect_said(*words)
    assert project.picture() == picture, "the refused run changed the run folder"
    ended = project.train(overrides=[f"{key}={before}"]).expect(0)
    assert resumed_from(ended.said) == 9
    project.finished().assert_equal(lab.reference("lora"))
    return Survived(equal=True)


def rows(lab: Lab) -> Survived:
    """The file is the same, a word in it is not."""
    return _private(lab, "chats.jsonl", lambda file: file.write_text(file.read_text().replace("answers 7", "replies 7")), ("data", "rows"))


def tokenizer(lab: Lab) -> Survived:
    """The same rows become other tokens."""

    def spoil(file: Path) -> None:
        content = json.loads(file.read_text())
        content["model"]["merges"] = content["model"]["merges"][:-5]
        file.write_text(json.dumps(content))

    return _private(lab, "model/tokenizer.json", spoil, ("data",))


def _private(lab: Lab, name: str, spoil: object, words: Sequence[str]) -> Survived:
    assert callable(spoil)
    project = lab.project("lora")
    shutil.copytree(lab.shared / "model", project.folder / "model")
    shutil.copy(lab.shared / "chats.jsonl", project.folder)
    places = ["model=./model", "data.train=chats.jsonl"]
    project.train({"at": "step", "step": 10, "do": "kill"}, overrides=places).expect(-signal.SIGKILL)
    file, picture = project.folder / name, project.picture()
    content = file.read_bytes()
    spoil(file)
    project.train(overrides=places).expect(REFUSED).expect_said(*words)
    assert project.picture() == picture, "the refused run changed the run folder"
    file.write_bytes(content)
    project.train(overrides=places).expect(0)
    project.finished().assert_equal(lab.reference("lora"))
    return Survived(equal=True)


def forced(lab: Lab) -> Survived:
    """It goes on, and says what is different."""
    project = lab.half("lora")
    ended = project.train(overrides=["train.learning_rate=0.02", "resume=force"])
    if ended.code == REFUSED and "force" in ended.said:
        raise NotBuilt("resume: force")
    ended.expect(0).expect_said("train.learning_rate", "0.01", "0.02")
    assert resumed_from(ended.said) == 9
    return Survived()


def _need_strategy(name: str) -> None:
    from typing import get_args

    from burnish.config.sections import Parallel

    if name not in get_args(Parallel.model_fields["strategy"].annotation):
        raise NotBuilt(f"parallel.strategy: {name}")
