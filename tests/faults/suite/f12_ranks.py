"""F12 and F13: one of several processes hangs or dies."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator

from tests.faults.suite.processes import ROOT, Started, driven, start, torchrun
from tests.faults.suite.project import STEPS, Project, read_lines, resumed_from
from tests.faults.suite.tries import Lab, Survived, Try, need

FAILED = 1
TIMEOUT = "parallel.timeout=10s"


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """In a step, in an evaluation, while rank 0 saves; by signal, by exception; started again by torchrun and by itself."""
    if short:
        return
    for place in ("step", "evaluate", "load"):
        yield Try("F12", f"a rank sleeps in {place}", lambda lab, p=place: hangs(lab, p))
    yield Try("F12", "a rank is stopped from outside (SIGSTOP)", stopped)
    yield Try("F12", "rank 0 sleeps in a save", lambda lab: hangs(lab, "save", rank=0))
    for how in ("kill", "raise"):
        yield Try("F13", f"a rank dies ({how}); torchrun is started again", lambda lab, h=how: restarted(lab, h))
        yield Try("F13", f"a rank dies ({how}); parallel.restarts starts the group again", lambda lab, h=how: restarts(lab, h))
        yield Try("F13", f"a rank dies ({how}); nobody starts it again", lambda lab, h=how: dies(lab, h))
    yield Try("F13", "rank 0 dies in a save", lambda lab: dies(lab, "kill", place="save", rank=0))


def _launched(lab: Lab, *overrides: str) -> Project:
    need("parallel.processes")
    return lab.project("lora", "parallel.processes=2", *overrides)


def _two(lab: Lab) -> Project:
    """What two undisturbed processes leave."""
    key = "two processes"
    with lab.once(key):
        if key not in lab.projects:
            project = lab.project("lora")
            start(torchrun(2, *driven([], "train", "run.yaml")), project.folder).wait().expect(0)
            lab.projects[key] = project
    return lab.projects[key]


def hangs(lab: Lab, place: str, *, rank: int = 1) -> Survived:
    """Found within the time-out, named, ended; the same command goes on."""
    project = _launched(lab, TIMEOUT)
    after = {} if place == "load" else {"after": 5}
    fault = {"at": place, **after, "rank": rank, "do": "sleep:3600", "once": str(project.folder / "slept")}
    ended = _plain(project, fault).wait(150)
    assert ended.code == FAILED, f"exit code {ended.code}: {ended.said[-1500:]}"
    ended.expect_said(f"rank {rank}")
    assert not _alive(project), "processes are left over"
    return _ends_as_two(lab, project)


def stopped(lab: Lab) -> Survived:
    """The same where the process cannot even run a handler."""
    project = _launched(lab, TIMEOUT, "train.steps=4000", "save.every=50st", "evaluation.every=null")
    process = project.start()
    assert process.wait_for(lambda: project.steps_logged > 60)
    found = re.findall(r"^\d+", _ranks(project), re.M)
    assert found, "the ranks were not found"
    os.kill(int(found[-1]), signal.SIGSTOP)
    ended = process.wait(150)
    assert ended.code == FAILED, f"exit code {ended.code}: {ended.said[-1500:]}"
    ended.expect_said("rank 1")
    assert not _alive(project), "processes are left over"
    return Survived()


def restarted(lab: Lab, how: str) -> Survived:
    """By whoever started torchrun. (Its own --max-restarts is left out: after a SIGKILL a new gloo group may hang, without burnish too.)"""
    project = lab.project("lora")
    fault = {"at": "step", "step": 8, "rank": 1, "do": how, "once": str(project.folder / "died")}
    words = torchrun(2, *driven([fault], "train", "run.yaml"))
    assert start(words, project.folder).wait().code == FAILED
    ended = start(words, project.folder).wait().expect(0)
    assert resumed_from(ended.said), ended.said[-800:]
    project.finished().assert_equal(_two(lab).finished())
    return Survived(lost=1, equal=True)


def restarts(lab: Lab, how: str) -> Survived:
    """By burnish."""
    project = _launched(lab, "parallel.restarts=1")
    fault = {"at": "step", "step": 8, "rank": 1, "do": how, "once": str(project.folder / "died")}
    ended = _plain(project, fault).wait()
    assert ended.code == 0, ended.said[-1500:]
    ended.expect_said("rank 1")
    project.finished().assert_equal(_two(lab).finished())
    return Survived(lost=1, equal=True)


def dies(lab: Lab, how: str, *, place: str = "step", rank: int = 1) -> Survived:
    """Named, the others are ended, exit code 1; the same command goes on."""
    project = _launched(lab)
    fault = {"at": place, "after": 7, "rank": rank, "do": how, "once": str(project.folder / "died")}
    ended = _plain(project, fault).wait()
    assert ended.code == FAILED, f"exit code {ended.code}: {ended.said[-1500:]}"
    ended.expect_said(f"rank {rank}", *(["SIGKILL"] if how == "kill" else ["put in by the fault suite"]))
    assert not _alive(project), "processes are left over"
    return _ends_as_two(lab, project)


def _plain(project: Project, fault: dict[str, object]) -> Started:
    """The command that launches by itself; the fault is in a rank."""
    path = os.pathsep.join([str(ROOT / "tests/faults/suite/site"), str(ROOT / "src"), str(ROOT)])
    return project.start(environment={"FAULTS_OF_RANKS": json.dumps([fault]), "PYTHONPATH": path})


def _ends_as_two(lab: Lab, project: Project) -> Survived:
    project.start().wait().expect(0)
    assert [line["step"] for line in read_lines(project.run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    project.finished().assert_equal(_two(lab).finished())
    return Survived(lost=2, equal=True)


def _ranks(project: Project) -> str:
    """The processes of the run that have a rank: number and rank, by rank."""
    found: list[tuple[int, int]] = []
    for folder in os.listdir("/proc"):
        if not folder.isdigit():
            continue
        try:
            with open(f"/proc/{folder}/environ", "rb") as file:
                variables = dict(word.split(b"=", 1) for word in file.read().split(b"\0") if b"=" in word)
            here = os.readlink(f"/proc/{folder}/cwd") == str(project.folder)
        except OSError:
            continue
        if here and b"RANK" in variables:
            found.append((int(variables[b"RANK"]), int(folder)))
    return "\n".join(f"{pid} {rank}" for rank, pid in sorted(found))


def _alive(project: Project) -> bool:
    return bool(_ranks(project))
