"""F2: told to stop, politely, in every phase."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

from tests.faults.suite.f01_kill import gone_on
from tests.faults.suite.processes import Ended, driven, start, torchrun
from tests.faults.suite.project import EXACT, KINDS, Project, resumed_from
from tests.faults.suite.tries import Lab, Survived, Try

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
PLACES = (("load", 1), ("step", 1), ("step", 9), ("update", 5), ("evaluate", 2), ("save", 3), ("prune", 4), ("update", 14), ("export", 1))
INTERRUPTED = 3


def tries(_seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """Every signal in every phase; once, twice; with files; to one rank of two."""
    kinds = list(KINDS)
    for number, (phase, occurrence) in enumerate(PLACES):
        if short and number % 2:
            continue
        for name in [SIGNALS[number % 3]] if short else SIGNALS:
            kind = kinds[number % len(kinds)]
            yield Try(
                "F2", f"{kind}: {name} in {phase} {occurrence}", lambda lab, k=kind, p=phase, n=occurrence, s=name: once(lab, k, p, n, s)
            )
    for phase, occurrence in (("save", 3),) if short else (("step", 5), ("save", 3), ("evaluate", 2)):
        for name in ("SIGINT",) if short else SIGNALS:  # the others count once within a second
            yield Try(
                "F2", f"{name} twice, the second in {phase} {occurrence}", lambda lab, p=phase, n=occurrence, s=name: twice(lab, p, n, s)
            )
    yield Try("F2", "a file STOP", stop_file)
    yield Try("F2", "a file SAVE", save_file)
    if not short:
        for name in SIGNALS:
            yield Try("F2", f"{name} from outside, to the plain command", lambda lab, s=name: from_outside(lab, s))
        yield Try("F2", "Ctrl-C, to the whole group of processes", lambda lab: from_outside(lab, "SIGINT", group=True))
        yield Try("F2", "SIGTERM to one rank of two", one_rank)


def once(lab: Lab, kind: str, phase: str, occurrence: int, name: str) -> Survived:
    """One signal: the run stops after the step, with a checkpoint, exit code 3; in its last moments it may as well finish."""
    lab.reference(kind)
    project = lab.project(kind)
    ended = project.train({"at": phase, "number": occurrence, "do": f"signal:{name}"})
    finishing = (phase, occurrence) == ("update", 14) or phase == "export"
    ended.expect(*((INTERRUPTED, 0) if finishing else (INTERRUPTED,)))
    if ended.code == INTERRUPTED and phase not in ("load", "export"):
        _has_checkpoint(project, ended)
    return gone_on(project, lab, kind, before=project.steps_logged)


def twice(lab: Lab, phase: str, occurrence: int, name: str) -> Survived:
    """The second one ends the process at once, whatever it is doing; nothing is spoiled."""
    lab.reference("lora")
    project = lab.project("lora")
    step = {"step": 5, "save": 5, "evaluate": 5}[phase]
    send = f"signal:{name}"
    first, more = ({"at": "step", "step": step, "number": number, "do": send} for number in (1, 2))
    ended = project.train(first, {"at": phase, "number": occurrence, "do": send}, more)
    assert ended.code != 0, "it went on after the second signal"
    assert "Traceback" not in ended.said, ended.said[-1500:]
    return gone_on(project, lab, "lora", before=project.steps_logged)


def from_outside(lab: Lab, name: str, *, group: bool = False) -> Survived:
    """The plain command in a long run, once it is training."""
    overrides = ("train.steps=400", "save.every=100st", "evaluation.every=null")
    lab.reference("lora", *overrides)
    project = lab.project("lora", *overrides)
    process = project.start()
    assert process.wait_for(lambda: project.steps_logged > 20)
    process.send(getattr(signal, name), group=group)
    ended = process.wait().expect(INTERRUPTED)
    _has_checkpoint(project, ended)
    return gone_on(project, lab, "lora", *overrides, before=project.steps_logged)


def stop_file(lab: Lab) -> Survived:
    """Touched: saved, ended with exit code 3, and the file is gone, so that the same command goes on."""
    project = lab.project("lora")
    ended = project.train({"at": "step", "step": 5, "do": "ask:STOP"}).expect(INTERRUPTED)
    assert not (project.run / "STOP").exists(), "the file STOP is still there"
    assert project.steps_logged in (5, 6), project.steps_logged
    _has_checkpoint(project, ended)
    return gone_on(project, lab, "lora", before=project.steps_logged)


def save_file(lab: Lab) -> Survived:
    """Touched: a checkpoint of a step at which none is due, and training goes on."""
    never = ["save.every=100st", "save.best=false"]
    project = lab.project("lora", *never)
    project.train({"at": "step", "step": 5, "do": "ask:SAVE"}, {"at": "step", "step": 12, "do": "kill"}).expect(-signal.SIGKILL)
    assert not (project.run / "SAVE").exists(), "the file SAVE is still there"
    (folder,) = project.checkpoints
    assert folder.name in ("step-000005", "step-000006"), folder
    ended = project.train().expect(0)
    assert resumed_from(ended.said) == int(folder.name[5:])
    project.finished().assert_equal(lab.reference("lora", *never))
    return Survived(lost=12 - 1 - int(folder.name[5:]), equal=True)


def one_rank(lab: Lab) -> Survived:
    """All ranks save the same step and end."""
    overrides = (*EXACT, "train.steps=60", "save.every=50st", "evaluation.every=null")
    project = lab.project("lora", *overrides)
    fault = {"at": "step", "step": 7, "rank": 1, "do": "signal:SIGTERM"}
    words = torchrun(2, *driven([fault], "train", "run.yaml", *overrides))
    ended = start(words, project.folder).wait()
    assert ended.code in (1, INTERRUPTED), ended.said[-1500:]  # torchrun has one code, and a traceback, for every failure of its ranks
    assert [path.name for path in project.checkpoints] == ["step-000007"], f"{project.checkpoints}"
    start(torchrun(2, *driven([], "train", "run.yaml", *overrides)), project.folder).wait().expect(0)
    whole = lab.project("lora", *overrides)
    start(torchrun(2, *driven([], "train", "run.yaml", *overrides)), whole.folder).wait().expect(0)
    project.finished().assert_equal(whole.finished())
    return Survived(equal=True)


def _has_checkpoint(project: Project, ended: Ended) -> None:
    assert project.checkpoints, f"no checkpoint: {ended.said[-800:]}"
    newest = project.checkpoints[-1]
    step = int(newest.name[5:])
    assert step == project.steps_logged, f"the newest checkpoint is of step {step}, the last step done was {project.steps_logged}"
    assert json.loads((newest / "manifest.json").read_text())["step"] == step
