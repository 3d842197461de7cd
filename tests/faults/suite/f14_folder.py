"""F14, F15, F17 and F20: what is kept, in what order, by whom, and how much it is. F19: exactness, by the tests that hold it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

from safetensors import safe_open
from tests.faults.suite.f01_kill import gone_on
from tests.faults.suite.f04_damage import flip
from tests.faults.suite.processes import ROOT, environment
from tests.faults.suite.project import resumed_from
from tests.faults.suite.tries import Lab, Survived, Try

REFUSED = 2


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """Deleting that fails or is cut off; damage to what is newer than what is saved; time stamps, clocks, widths; locks; sizes."""
    draw = random.Random(seed)
    kinds = (("renamed", r"rename .*/step-"), ("emptied", r"remove .*/\.discarded"), ("removed", r"rmdir .*/\.discarded"))
    for what, pattern in kinds[:1] if short else kinds:
        yield Try("F14", f"an old checkpoint cannot be {what}", lambda lab, p=pattern: undeletable(lab, p))
    for number in sorted(draw.sample(range(1, 10), 2 if short else 9)):
        yield Try("F14", f"keep: 1, killed at operation {number} of deleting", lambda lab, n=number: cut_off(lab, n))
    yield Try("F14", "the best checkpoint is the oldest, keep: 1", oldest_is_best)
    yield Try("F14", "keep: 1, and a damaged checkpoint is newer than the good ones", damaged_and_newer)
    yield Try("F15", "time stamps in a wrong order", time_stamps)
    yield Try("F15", "the clock jumps ten years back", clock)
    yield Try("F15", "step numbers of unequal width", widths)
    yield Try("F17", "a second run in the same folder", second)
    yield Try("F17", "two runs started at once", at_once)
    for kind in ("lora",) if short else ("lora", "full"):
        yield Try("F20", f"size of the checkpoints: {kind}", lambda lab, k=kind: size(lab, k))
    if not short:
        for folder in ("tests/parity", "tests/unit/engine/test_step.py", "tests/golden"):
            yield Try("F19", folder, lambda lab, f=folder: tests(f))


def undeletable(lab: Lab, pattern: str) -> Survived:
    """Said, and training goes on; the checkpoint that stays does no harm."""
    reference = lab.reference("lora")
    project = lab.project("lora")
    project.train({"at": "file", "match": pattern, "after": 4, "times": 0, "do": "errno:EACCES"}).expect(0)
    project.finished().assert_equal(reference)
    return Survived(equal=True)


def cut_off(lab: Lab, number: int) -> Survived:
    """Between the write of a checkpoint and the end of deleting the one before, there is always a good one."""
    overrides = ("save.keep=1", "save.best=false")
    lab.reference("lora", *overrides)
    project = lab.project("lora", *overrides)
    pattern = r"(rename .*/step-)|(\.discarded)"
    project.train({"at": "file", "match": pattern, "after": 4, "number": number, "do": "kill"}).expect(-signal.SIGKILL)
    assert project.checkpoints, "no checkpoint is left"
    return gone_on(project, lab, "lora", *overrides, before=project.steps_logged)


def oldest_is_best(lab: Lab) -> Survived:
    """It outlives all newer ones and is what is exported."""
    overrides = ("save.keep=1",)
    project = lab.project("dpo-full", *overrides)
    ended = project.train().expect(0).expect_said("the weights are those of step")
    best = int(re.findall(r"the weights are those of step (\d+)", ended.said)[0])
    assert [path.name for path in project.checkpoints] == [f"step-{best:06d}", "step-000014"], project.checkpoints
    again = lab.half("dpo-full", *overrides, fault={"at": "step", "step": 13})
    again.train().expect(0)
    again.finished().assert_equal(project.finished())
    return Survived(equal=True)


def damaged_and_newer(lab: Lab) -> Survived:
    """A damaged one does not count as the newest: the good ones before it must not be deleted in its favour."""
    overrides = ("evaluation.every=null",)
    project = lab.half("lora", *overrides)
    assert [path.name for path in project.checkpoints] == ["step-000006", "step-000008"]
    flip("model.safetensors", 0.7, 1)(project.checkpoints[-1])
    more = ["save.every=1st", "save.keep=1"]
    ended = project.train({"at": "update", "step": 8, "do": "kill"}, overrides=more).expect(-signal.SIGKILL)
    assert resumed_from(ended.said) == 6
    ended = project.train(overrides=more).expect(0)
    assert resumed_from(ended.said) in (6, 7), ended.said[-800:]
    project.finished().assert_equal(lab.reference("lora", *overrides))
    return Survived(lost=3, equal=True)


def time_stamps(lab: Lab) -> Survived:
    """Steps alone decide which one is the newest."""
    project = lab.half("lora")
    for number, folder in enumerate(project.checkpoints):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (10**9 - number * 10**6, 10**9 - number * 10**6))
    ended = project.train().expect(0)
    assert resumed_from(ended.said) == 9
    project.finished().assert_equal(lab.reference("lora"))
    return Survived(equal=True)


def clock(lab: Lab) -> Survived:
    """In the middle of a run."""
    project = lab.project("lora")
    project.train({"at": "step", "step": 6, "do": "clock"}, {"at": "step", "step": 10, "do": "kill"}).expect(-signal.SIGKILL)
    return gone_on(project, lab, "lora", before=project.steps_logged)


def widths(lab: Lab) -> Survived:
    """999,999 comes before 1,000,000, though not by name."""
    from burnish.engine.checkpoint import folders, newest

    project = lab.half("lora")
    root = project.run / "checkpoints"
    for folder, number in zip(project.checkpoints[-2:], (999999, 1000000), strict=True):
        shutil.copytree(folder, root / f"step-{number}")
    assert [path.name for path in folders(root)][-2:] == ["step-999999", "step-1000000"]
    found = newest(root)  # a name that contradicts what is inside may be refused
    assert found is not None and found.name in ("step-1000000", "step-000009"), found
    return Survived()


def second(lab: Lab) -> Survived:
    """Refused with a clear message; the first does not notice. After kill -9 the folder is free again."""
    project = lab.project("lora")
    first = project.begin({"at": "step", "step": 10, "do": "signal:SIGSTOP"})
    assert first.wait_for(lambda: project.steps_logged == 9)
    project.train(timeout=60).expect(REFUSED).expect_said(str(project.run))
    first.send(signal.SIGKILL)
    first.wait().expect(-signal.SIGKILL)
    return gone_on(project, lab, "lora", before=project.steps_logged)


def at_once(lab: Lab) -> Survived:
    """One of them trains, the other one is refused, or finds it finished."""
    reference = lab.reference("lora")
    project = lab.project("lora")
    codes = sorted(process.wait().expect(0, REFUSED).code for process in [project.begin(), project.begin()])
    assert codes == [0, REFUSED], f"exit codes {codes}"
    project.finished().assert_equal(reference)
    return Survived(equal=True)


def size(lab: Lab, kind: str) -> Survived:
    """The trained weights and two moments, and little else; a frozen weight is never written."""
    project = lab.half(kind)
    newest = project.checkpoints[-1]
    with safe_open(newest / "model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        trained = sum(tensors.get_tensor(name).nbytes for name in names)
    if kind == "lora":
        assert names and all("lora_" in name for name in names), [name for name in names if "lora_" not in name][:3]
    files = {path.name: path.stat().st_size for path in newest.iterdir()}
    headers = 200 * len(names) + 8192
    assert files["model.safetensors"] <= trained + headers, files
    assert files["optimizer.safetensors"] <= 2 * trained + 2 * headers, files
    assert sum(files.values()) <= 3 * trained + 8 * headers, files
    return Survived()


def tests(path: str) -> Survived:
    """They pass, the slow ones too, and there are some."""
    words = [sys.executable, "-m", "pytest", "-m", "", "-v", "-p", "no:cacheprovider", path]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout[-1500:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 0
    return Survived(equal=True, count=int(passed[1]))
