"""F3 and F16: storage that is full, fails, is read-only, slow, or gone."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from tests.faults.suite.project import SAVE_EVERY, STEPS, Project, resumed_from
from tests.faults.suite.tries import Lab, Survived, Try

FAILED = 1
OPTIMIZER_DOES_NOT_FIT = 150_000  # bytes: of the whole model 112 kB of weights fit, 225 kB of moments do not
TMPFS = 8 << 20

PLACES = {
    "model.safetensors": r"write .*/model\.safetensors",
    "optimizer.safetensors": r"write .*optimizer\.safetensors",
    "rng.safetensors": r"write .*rng\.safetensors",
    "trainer.json": r"open .*trainer\.json",
    "manifest.json": r"open .*manifest\.json",
    "fsync": r"fsync .*checkpoints",
    "rename": r"rename .*checkpoints/\.unfinished",
    "mkdir": r"mkdir .*checkpoints/\.unfinished",
}
"""Operations of a save."""


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """Full in one save, in some, in all; failing for a moment, for good."""
    draw = random.Random(seed)
    for name, pattern in draw.sample(sorted(PLACES.items()), 2) if short else PLACES.items():
        yield Try("F3", f"ENOSPC at {name}, once", lambda lab, p=pattern: passing(lab, "ENOSPC", p, times=1))
        yield Try("F16", f"EIO at {name}, twice", lambda lab, p=pattern: passing(lab, "EIO", p, times=2))
    yield Try("F3", "the third and fourth save do not fit (RLIMIT_FSIZE)", for_a_while)
    yield Try("F3", "no save fits (RLIMIT_FSIZE)", to_the_end)
    if not short:
        yield Try("F3", "the cache does not fit (RLIMIT_FSIZE)", cache)
        yield Try("F3", "a tmpfs is full for a while", lambda lab: tmpfs(lab, frees=True))
        yield Try("F3", "a tmpfs is full to the end", lambda lab: tmpfs(lab, frees=False))
        for name, pattern in (
            ("metrics.jsonl", r"open .*metrics\.jsonl"),
            ("run.yaml", r"open .*run\.yaml"),
            ("the model", r"\.model\.new"),
            ("the report", r"report\.html"),
        ):
            yield Try("F3", f"ENOSPC at {name}", lambda lab, p=pattern: elsewhere(lab, "ENOSPC", p))
            yield Try("F16", f"EROFS at {name}", lambda lab, p=pattern: elsewhere(lab, "EROFS", p))
        yield Try("F16", "EIO in every save", lambda lab: refused(lab, "EIO"))
        yield Try("F16", "fsync takes long", slow)
    yield Try("F16", "read-only from the fourth save on", lambda lab: refused(lab, "EROFS"))
    yield Try("F16", "the run folder is moved away", vanished)


def passing(lab: Lab, error: str, pattern: str, *, times: int) -> Survived:
    """A fault in one save that goes by: the run goes on to its end, and nobody sees it in the result."""
    reference = lab.reference("lora")
    project = lab.project("lora")
    project.train({"at": "file", "match": pattern, "after": 6, "times": times, "do": f"errno:{error}"}).expect(0)
    project.finished().assert_equal(reference)
    project.assert_tidy()
    return Survived(equal=True)


def for_a_while(lab: Lab) -> Survived:
    """Two saves fail with a warning and training goes on; the next one works; killed after it, the run goes on from it."""
    reference = lab.reference("full")
    faults = [
        {"at": "save", "number": 3, "do": f"limit:{OPTIMIZER_DOES_NOT_FIT}"},
        {"at": "step", "step": 9, "do": "limit:-1"},
    ]
    project = lab.project("full")
    ended = project.train(*faults).expect(0).expect_said("warning")
    assert ended.said.lower().count("warning") >= 1
    project.finished().assert_equal(reference)
    project.assert_tidy()
    return Survived(equal=True)


def to_the_end(lab: Lab) -> Survived:
    """Training goes on to its last step; then exit code 1 and one clear message; older checkpoints are as they were."""
    lab.reference("full")
    project = lab.project("full")
    ended = project.train({"at": "save", "number": 3, "do": f"limit:{OPTIMIZER_DOES_NOT_FIT}"})
    ended.expect(FAILED).expect_said("could not be written")
    assert project.steps_logged == STEPS, f"training ended after step {project.steps_logged}"
    steps = [int(path.name[5:]) for path in project.checkpoints]
    assert steps and max(steps) <= 3 * SAVE_EVERY, steps
    return _then(project, lab, "full", resumes=max(steps))


def cache(lab: Lab) -> Survived:
    """Before a step is done: one clear message."""
    lab.reference("lora")
    project = lab.project("lora")
    process = project.server.start(["train", "run.yaml"], project.folder, [{"at": "none", "do": "note"}], limits={"RLIMIT_FSIZE": 1000})
    process.wait().expect(FAILED, 2)
    return _then(project, lab, "lora", resumes=None)


def tmpfs(lab: Lab, *, frees: bool) -> Survived:
    """Not a byte is free, for checkpoints or for anything else: the run goes on or ends cleanly, and nothing is spoiled."""
    lab.reference("full")
    project = lab.project("full")
    project.run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", project.run], capture_output=True, check=False).returncode:
        return Survived(note="mounting is not permitted here: seen with RLIMIT_FSIZE alone")
    try:
        faults: list[Mapping[str, Any]] = [{"at": "step", "step": 6, "do": "fill"}]
        if frees:
            faults.append({"at": "step", "step": 9, "do": "unfill"})
        ended = project.train(*faults).expect(*((0, FAILED) if frees else (FAILED,)))
        assert "No space left" in ended.said or "free" in ended.said, ended.said[-800:]
        (project.run / "filler").unlink(missing_ok=True)
        done = _then(project, lab, "full", resumes=None) if ended.code else Survived(equal=True)
        project.finished().assert_equal(lab.reference("full"))
        return done
    finally:
        subprocess.run(["umount", project.run], check=False)


def elsewhere(lab: Lab, error: str, pattern: str) -> Survived:
    """A file that is no checkpoint cannot be written, ever: one clear message, or done without it; nothing is spoiled."""
    lab.reference("lora")
    project = lab.project("lora")
    ended = project.train({"at": "file", "match": pattern, "times": 0, "do": f"errno:{error}"}).expect(0, FAILED, 2)
    if ended.code == 0:
        ended.expect_said("warning")
    ended.expect_said({"ENOSPC": "No space left", "EROFS": "Read-only"}[error])
    return _then(project, lab, "lora", resumes=None)


def refused(lab: Lab, error: str) -> Survived:
    """Nothing can be saved any more: training goes on, the last save's failure is exit code 1, older checkpoints are untouched."""
    lab.reference("lora")
    project = lab.project("lora")
    ended = project.train({"at": "file", "match": r"checkpoints/\.", "saves": 4, "times": 0, "do": f"errno:{error}"})
    ended.expect(FAILED).expect_said("could not be written")
    assert project.steps_logged == STEPS, f"training ended after step {project.steps_logged}"
    return _then(project, lab, "lora", resumes=4)  # saved after 2, 4 and, the best so far, after 3


def slow(lab: Lab) -> Survived:
    """Nothing but time is lost."""
    reference = lab.reference("lora")
    project = lab.project("lora")
    project.train({"at": "file", "match": "fsync", "times": 0, "do": "sleep:0.1"}, timeout=240).expect(0)
    project.finished().assert_equal(reference)
    return Survived(equal=True)


def vanished(lab: Lab) -> Survived:
    """The run goes on or ends cleanly; put back, the folder is as good as it was."""
    lab.reference("lora")
    project = lab.project("lora")
    project.train({"at": "step", "step": 9, "do": "vanish"}).expect(0, FAILED, 2)
    shutil.rmtree(project.run, ignore_errors=True)
    (project.folder / "run.moved").rename(project.run)
    return _then(project, lab, "lora", resumes=None)


def _then(project: Project, lab: Lab, kind: str, *, resumes: int | None) -> Survived:
    """The fault is gone: the same command goes on from `resumes` and leaves what it should."""
    before = project.steps_logged
    ended = project.train().expect(0)
    if resumes is not None:
        assert resumed_from(ended.said) == resumes, f"it went on from {resumed_from(ended.said)}, expected {resumes}"
    project.finished().assert_equal(lab.reference(kind))
    project.assert_tidy()
    return Survived(lost=max(0, before - (resumed_from(ended.said) or 0)) if "already finished" not in ended.said else 0, equal=True)
