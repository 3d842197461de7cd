"""F9 to F11: gradients that are not finite, a loss that jumps, memory that is not there."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Iterator, Sequence

from tests.faults.suite.processes import driven, start, torchrun
from tests.faults.suite.project import EXACT, KINDS, STEPS, read_lines
from tests.faults.suite.tries import Lab, Survived, Try, need

STOPPED = (1, 2)


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """Every policy, in every kind of run; on one rank of two."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    for kind in kinds[:1] if short else kinds:
        step = draw.randint(4, 12)
        yield Try("F9", f"{kind}: NaN in step {step} is skipped", lambda lab, k=kind, s=step: skipped(lab, k, s))
    yield Try("F9", "five in a row end the run", patience)
    yield Try("F9", "non_finite: rollback, NaN once", lambda lab: rolled_back(lab, NAN_BACK, "backward", "nan"))
    yield Try("F10", "a spike once: rolled back", lambda lab: rolled_back(lab, (SPIKE,), "forward", "spike"))
    yield Try("F10", "a spike at each return: no endless loop", lambda lab: again_and_again(lab, (SPIKE,), "forward", "spike"))
    if not short:
        yield Try("F9", "non_finite: stop", lambda lab: stops(lab, "recovery.non_finite=stop", "backward", "nan"))
        yield Try("F9", "non_finite: rollback, NaN at each return", lambda lab: again_and_again(lab, NAN_BACK, "backward", "nan"))
        yield Try("F10", "a spike: skip", spike_skipped)
        yield Try("F10", "a spike: stop", lambda lab: stops(lab, SPIKE.replace("rollback", "stop"), "forward", "spike"))
        yield Try("F10", "a spike after a resume: the window of losses went on", spike_after_resume)
        yield Try("F9", "NaN on one rank of two", nan_on_one_rank)
        yield Try("F11", "out of memory on one rank of two", memory_on_one_rank)
    for place in ("backward",) if short else ("forward", "backward", "step"):
        for kind in kinds[:1] if short else kinds:
            times = draw.choice((1, 2))
            number = draw.randint(1, 2)
            yield Try(
                "F11",
                f"{kind}: out of memory in {place}, {times} x",
                lambda lab, k=kind, p=place, n=number, t=times: halved(lab, k, p, n, t),
            )
    yield Try("F11", "out of memory in the update", memory_in_the_update)
    yield Try("F11", "out_of_memory: stop", lambda lab: stops(lab, "recovery.out_of_memory=stop", "forward", "oom"))
    yield Try("F11", "no memory for a single example", no_memory_at_all)
    yield Try("F11", "killed after halving, gone on with", memory_then_kill)


NAN_BACK = ("recovery.non_finite=rollback", "recovery.patience=1")
SPIKE = "recovery.spike={sigma: 6.0, window: 8, action: rollback}"


def _recover(*overrides: str) -> list[str]:
    """The overrides; they are refused where the section `recovery` is not built."""
    need("recovery")
    return list(overrides)


def skipped(lab: Lab, kind: str, step: int) -> Survived:
    """Counted, said, and the weights stay those of the step before; the same whether the run is killed later or not."""
    fault = {"at": "backward", "step": step, "do": "nan"}
    whole, killed = lab.project(kind), lab.project(kind)
    ended = whole.train(fault).expect(0).expect_said(f"step {step} is skipped")
    assert ended.said.count("is skipped") == 1
    finished = whole.finished()
    lines = {line["step"]: line for line in finished.steps}
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert lines[step]["grad_norm"] is None and all(math.isfinite(line["grad_norm"]) for n, line in lines.items() if n != step)
    undisturbed = lab.reference(kind)
    assert finished.steps[: step - 1] == undisturbed.steps[: step - 1]
    assert finished.steps[step - 1]["tokens"] == undisturbed.steps[step - 1]["tokens"], "it is another step's data"
    killed.train(fault, {"at": "update", "step": min(step + 2, STEPS), "do": "kill"}).expect(-signal.SIGKILL)
    killed.train(fault).expect(0)
    killed.finished().assert_equal(finished)
    return Survived(equal=True)


def patience(lab: Lab) -> Survived:
    """Ended with one clear message, and without a checkpoint of anything that is not finite; the next start is not poisoned."""
    project = lab.project("lora")
    ended = project.train({"at": "backward", "after": 6, "times": 0, "do": "nan"}).expect(*STOPPED)
    ended.expect_said("not finite", "5 steps in a row")
    project.train({"at": "none", "do": "note"}).expect(0)
    assert [line["step"] for line in read_lines(project.run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return Survived()


def stops(lab: Lab, policy: str, place: str, what: str, *, number: int = 1) -> Survived:
    """One clear message, exit code for an error, and started again without the fault it ends as if nothing had been."""
    project = lab.project("lora")
    overrides = _recover(policy)
    ended = project.train({"at": place, "step": 10, "number": number, "do": what}, overrides=overrides)
    ended.expect(*STOPPED).expect_said("step 10")
    project.train(overrides=overrides).expect(0)
    project.finished().assert_equal(lab.reference("lora"))
    return Survived(lost=1, equal=True)


def rolled_back(lab: Lab, policy: Sequence[str], place: str, what: str) -> Survived:
    """Back to the weights of the last checkpoint, said; what comes is the same in two such runs, one of them killed."""
    projects = [lab.project("lora") for _ in range(2)]
    overrides = _recover(*policy)
    fault = {"at": place, "step": 11, "do": what}
    for project, more in zip(projects, ([], [{"at": "step", "step": 13, "do": "kill"}]), strict=True):
        ended = project.train(fault, *more, overrides=overrides).expect(-signal.SIGKILL if more else 0)
        ended.expect_said("weights", "step-000010", "step 11")
    projects[1].train(fault, overrides=overrides).expect(0)
    first, second = (project.finished() for project in projects)
    second.assert_equal(first)
    projects[0].assert_tidy()
    assert [line["step"] for line in first.steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in first.steps if line["step"] != 11)
    assert first.steps[:10] == lab.reference("lora").steps[:10]
    return Survived(lost=1, equal=True)


def again_and_again(lab: Lab, policy: Sequence[str], place: str, what: str) -> Survived:
    """Whatever is done about it, it is done a few times and not for ever."""
    project = lab.project("lora")
    overrides = _recover(*policy)
    ended = project.train({"at": place, "after": 10, "times": 0, "do": what}, overrides=overrides, timeout=60).expect(0, *STOPPED)
    if ended.code:
        ended.expect_said("step 1")
    project.train(overrides=overrides).expect(0)
    assert [line["step"] for line in read_lines(project.run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return Survived()


def spike_skipped(lab: Lab) -> Survived:
    """The step changes nothing, and is counted."""
    project = lab.project("lora")
    overrides = _recover(SPIKE.replace("rollback", "skip"))
    project.train({"at": "forward", "step": 11, "do": "spike"}, overrides=overrides).expect(0).expect_said("step 11")
    finished = project.finished()
    assert [line["step"] for line in finished.steps] == list(range(1, STEPS + 1))
    assert finished.steps[:10] == lab.reference("lora").steps[:10]
    return Survived()


def spike_after_resume(lab: Lab) -> Survived:
    """What counts as a spike does not depend on where the run was interrupted."""
    whole, killed = lab.project("lora"), lab.project("lora")
    overrides = _recover(SPIKE.replace("rollback", "skip"))
    fault = {"at": "forward", "step": 11, "do": "spike"}
    whole.train(fault, overrides=overrides).expect(0)
    killed.train(fault, {"at": "step", "step": 10, "do": "kill"}, overrides=overrides).expect(-signal.SIGKILL)
    killed.train(fault, overrides=overrides).expect(0).expect_said("step 11")
    killed.finished().assert_equal(whole.finished())
    return Survived(lost=1, equal=True)


def nan_on_one_rank(lab: Lab) -> Survived:
    """Both skip the step; none waits for the other."""
    project = lab.project("lora")
    fault = {"at": "backward", "step": 6, "rank": 1, "do": "nan"}
    start(torchrun(2, *driven([fault], "train", "run.yaml")), project.folder).wait().expect(0).expect_said("step 6 is skipped")
    lines = read_lines(project.run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [6]
    assert len(lines) == STEPS
    return Survived()


def halved(lab: Lab, kind: str, place: str, number: int, times: int) -> Survived:
    """The same step is done again in smaller micro-batches: the same examples, the same loss up to the order of additions."""
    overrides = [word for word in EXACT if "adapter" in KINDS[kind]["more"] or not word.startswith("adapter")]
    overrides += ["train.precision=float32"]
    project = lab.project(kind, *overrides)
    _recover()
    fault = {"at": place, "step": 6, "number": number, "times": times, "do": "oom"}
    project.train(fault).expect(0).expect_said("memory", "step 6")
    project.finished().assert_close(lab.reference(kind, *overrides), relative=2e-4 if kind.startswith("dpo") else 2e-5)
    return Survived(equal=True)


def memory_in_the_update(lab: Lab) -> Survived:
    """What may be done by half is not repeated: the run stops, and goes on from its checkpoint."""
    project = lab.project("lora")
    _recover()
    project.train({"at": "optimizer", "step": 6, "do": "oom"}).expect(*STOPPED).expect_said("memory ran out in the update of step 6")
    project.train().expect(0)
    project.finished().assert_equal(lab.reference("lora"))
    return Survived(lost=1, equal=True)


def no_memory_at_all(lab: Lab) -> Survived:
    """Halving ends: one clear message, and the checkpoints before are there."""
    project = lab.project("lora")
    _recover()
    project.train({"at": "forward", "after": 6, "times": 0, "do": "oom"}, timeout=60).expect(*STOPPED).expect_said("memory")
    project.train().expect(0)
    project.finished().assert_equal(lab.reference("lora"))
    return Survived(lost=1, equal=True)


def memory_then_kill(lab: Lab) -> Survived:
    """Whether it starts again with the smaller or the given size, the mathematics is the same."""
    project = lab.project("lora", *EXACT)
    _recover()
    project.train({"at": "backward", "step": 6, "do": "oom"}, {"at": "step", "step": 10, "do": "kill"}).expect(-signal.SIGKILL)
    project.train().expect(0)
    project.finished().assert_close(lab.reference("lora", *EXACT))
    return Survived(lost=1, equal=True)


def memory_on_one_rank(lab: Lab) -> Survived:
    """Every rank cuts its part anew, and none waits for the other."""
    projects = [lab.project("lora", *EXACT) for _ in range(2)]
    _recover()
    faults: Sequence[dict[str, object]] = [{"at": "backward", "step": 6, "rank": 1, "do": "oom"}]
    for project, some in zip(projects, (faults, []), strict=True):
        start(torchrun(2, *driven(some, "train", "run.yaml", *EXACT)), project.folder).wait().expect(0)
    projects[0].finished().assert_close(projects[1].finished())
    return Survived(equal=True)
