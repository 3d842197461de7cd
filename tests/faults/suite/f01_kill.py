"""F1: killed at any instant."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

from tests.faults.suite.processes import Started
from tests.faults.suite.project import KINDS, SAVE_EVERY, Project, resumed_from
from tests.faults.suite.tries import Lab, Survived, Try

PHASES = {"load": 1, "step": 20, "update": 14, "evaluate": 5, "save": 6, "prune": 6, "export": 1, "report": 1}
"""How often each is reached at least; those that are reached a few times are met at the last one."""
OPERATIONS = 30
"""More than a save and the deletion of an old checkpoint take."""
CHAINS, KILLS_IN_A_ROW = 13, 4
LIFE = 9.0  # seconds of a whole run with its start; a little more, so that some kills come at its very end


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """Kills at drawn instants of the plain command, in chains; kills at drawn places of every phase; kills at every operation of a save."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    for number in range(0 if short else CHAINS):
        kind, instants = kinds[number % len(kinds)], [draw.random() for _ in range(KILLS_IN_A_ROW)]
        name = f"{kind}: kill -9 of the plain command, chain {number + 1}"
        yield Try("F1", name, lambda lab, k=kind, i=instants: at_instants(lab, k, i), KILLS_IN_A_ROW)
    for number, (phase, last) in enumerate(PHASES.items()):
        for kind in kinds[number % 4 : number % 4 + 1] if short else kinds:
            occurrence, delay = last if last < 6 else draw.randint(1, last), draw.random() * 0.02
            yield Try(
                "F1",
                f"{kind}: kill -9 in {phase} {occurrence}",
                lambda lab, k=kind, p=phase, n=occurrence, d=delay: in_phase(lab, k, p, n, d),
            )
    operations = sorted(draw.sample(range(1, OPERATIONS + 1), 3 if short else OPERATIONS))
    for how, what in (("kill", "kill -9"), ("powercut", "power cut")):
        for n in operations:
            yield Try("F1", f"{what} at file operation {n} of saving", lambda lab, n=n, how=how: at_operation(lab, "lora", n, how))


def gone_on(project: Project, lab: Lab, kind: str, *overrides: str, before: int) -> Survived:
    """After a fault: the same command once more ends well, and leaves what an uninterrupted run leaves."""
    ended = project.train().expect(0)
    lost = before - (resumed_from(ended.said) or 0)
    assert "already finished" in ended.said or lost <= 2 * SAVE_EVERY, f"{lost} steps were lost with a checkpoint every {SAVE_EVERY} steps"
    project.finished().assert_equal(lab.reference(kind, *overrides))
    project.assert_tidy()
    return Survived(lost=0 if "already finished" in ended.said else max(0, lost), equal=True)


def at_instants(lab: Lab, kind: str, instants: list[float]) -> Survived:
    """The plain command, killed and started again, killed and started again ..."""
    reference = lab.reference(kind)
    project = lab.project(kind)
    lost = 0
    for share in instants:
        before = project.steps_logged
        process = project.start()
        _sleep(process, share * LIFE)
        process.send(signal.SIGKILL)
        ended = process.wait()
        ended.expect(-signal.SIGKILL, 0)
        if (step := resumed_from(ended.said)) is not None:
            lost += max(0, before - step)
            assert before - step <= 2 * SAVE_EVERY, f"{before - step} steps were lost with a checkpoint every {SAVE_EVERY} steps"
    project.start().wait().expect(0)
    project.finished().assert_equal(reference)
    project.assert_tidy()
    return Survived(lost=lost, equal=True)


def in_phase(lab: Lab, kind: str, phase: str, occurrence: int, delay: float) -> Survived:
    """Killed from outside a moment after a phase has begun."""
    lab.reference(kind)
    project = lab.project(kind)
    process = project.begin({"at": phase, "number": occurrence, "do": "note"})
    process.wait_for(lambda: (project.folder / "points").exists())
    time.sleep(delay)
    process.send(signal.SIGKILL)
    process.wait().expect(-signal.SIGKILL, 0)
    return gone_on(project, lab, kind, before=project.steps_logged)


def at_operation(lab: Lab, kind: str, number: int, how: str) -> Survived:
    """Killed at one file operation of the fourth save, which also deletes an older checkpoint."""
    lab.reference(kind)
    project = lab.project(kind)
    ended = project.train({"at": "file", "match": "checkpoints", "after": 9, "number": number, "do": how})
    ended.expect(-signal.SIGKILL)
    return gone_on(project, lab, kind, before=project.steps_logged)


def _sleep(process: Started, seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.running and time.monotonic() < until:
        time.sleep(0.002)
