"""burnish's own command with faults put in from outside: the product knows nothing of them.

    python driver.py '[{"at": "save", "number": 2, "do": "kill"}]' train run.yaml
    python driver.py --serve                    processes with everything imported, started on request
    site/sitecustomize.py                       into ranks that burnish starts by itself

A fault names a point (`at`), which time that the point is reached it begins (`number`, from 1) and for how many times it goes on
(`times`, 0: for ever); or the optimiser step that is or will be next (`step`, from 1; `after`: from then on), or the save that has
begun (`saves`: from then on; saves lag behind steps, which do not wait for them). It may be for one `rank` only, and for one process
only (`once`, a file to remember it).

    load, evaluate, save, prune, export, report     these are about to begin
    step, forward, backward, optimizer, update      a micro-batch, its loss, the gradient of a weight in its middle; the optimiser; all
    file                                            an operation on a file below a folder `run` (open, write, fsync, rename, remove, mkdir)
                                                    whose description matches `match`; writing is cut off after half of the bytes

What is done there:

    kill, powercut          SIGKILL; the same, and what was not flushed to the disk is lost
    signal:SIGTERM          to this process
    errno:ENOSPC, oom       raised
    raise, sleep:3600       an error; nothing for so many seconds
    nan, spike              the gradient (of `backward`); a loss a thousand times as high (of `forward`)
    limit:150000            no file may grow beyond; -1: as it was
    fill, unfill            not a byte is free on the run folder's disk
    clock, vanish           the time of day jumps ten years back; the run folder is moved away
    ask:STOP                a file of this name in the run folder
    note                    a line in the file `points`
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Injector:
    """Counts how often points are reached, and does what was asked for."""

    def __init__(self) -> None:
        self.faults: list[dict[str, Any]] = []
        self.step = 0
        self.saves = 0
        self.unflushed: dict[str, int] = {}  # files that were written to, and their size when that began
        self._busy = False

    def set(self, faults: Sequence[Mapping[str, Any]]) -> None:
        """Begins; faults of other ranks are left out."""
        rank = int(os.environ.get("RANK", "0"))
        self.faults = [{"times": 1, **fault, "seen": 0} for fault in faults if fault.get("rank", rank) == rank]

    def wants(self, point: str) -> bool:
        """Whether any fault is for this point."""
        return any(fault["at"] == point for fault in self.faults)

    def reach(self, point: str, detail: str = "") -> str | None:
        """Tells that a point is reached. Returns what the caller must do itself (`nan`, `spike`), or None."""
        if self._busy:
            return None
        self.saves += point == "save"
        for fault in self.faults:
            if fault["at"] != point or not re.search(fault.get("match", ""), detail):
                continue
            if self.step < fault.get("after", 0) or self.saves < fault.get("saves", 0):
                continue
            if fault.get("step", self.step) != self.step:
                continue
            fault["seen"] += 1
            first, times = fault.get("number", 1), fault["times"]
            if fault["seen"] < first or (times and fault["seen"] >= first + times):
                continue
            if "once" in fault:
                if os.path.exists(fault["once"]):
                    continue
                self._quietly(lambda path=fault["once"]: Path(path).touch())
            return self._do(fault["do"], point, detail)
        return None

    def _quietly(self, work: Callable[[], Any]) -> None:
        self._busy = True
        try:
            work()
        finally:
            self._busy = False

    def _do(self, what: str, point: str, detail: str) -> str | None:
        kind, _, argument = what.partition(":")
        if kind in ("nan", "spike"):
            return kind
        actions: dict[str, Callable[[], Any]] = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "powercut": self._power_cut,
            "signal": lambda: os.kill(os.getpid(), getattr(signal, argument)),
            "sleep": lambda: time.sleep(float(argument or 3600)),
            "clock": _jump,
            "ask": lambda: Path("run", argument).touch(),
            "vanish": lambda: os.rename("run", "run.moved"),
            "limit": lambda: _limit(int(argument)),
            "fill": _fill,
            "unfill": lambda: os.remove(FILLER),
            "note": lambda: _append("points", f"{point} {detail}"),
        }
        if kind in actions:
            self._quietly(actions[kind])
        elif kind == "errno":
            number = getattr(errno, argument)
            raise OSError(number, os.strerror(number), detail.partition(" ")[2] or None)
        elif kind == "oom":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (put in by the fault suite)")
        elif kind == "raise":
            raise RuntimeError("put in by the fault suite")
        else:
            raise SystemExit(f"unknown fault {what!r}")
        return None

    def _power_cut(self) -> None:
        for path, size in self.unflushed.items():
            if os.path.isfile(path):
                os.truncate(path, min(size, os.path.getsize(path)))
        os.kill(os.getpid(), signal.SIGKILL)


INJECTOR = Injector()
_BELOW = f"{os.sep}run{os.sep}"


def _append(path: str, line: str) -> None:
    with open(path, "a") as file:
        file.write(f"{line}\n")


FILLER = "run/filler"


def _limit(size: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else hard, hard))


def _fill() -> None:
    """Until not a byte is free."""
    with open(FILLER, "wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def _jump() -> None:
    real = time.time
    time.time = lambda: real() - 10 * 365 * 86400


def _path(path: Any, directory: int = -1) -> str:
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if directory is not None and directory >= 0 and not os.path.isabs(text):
        return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
    return os.path.abspath(text)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of every file operation before it is done; raising here stops it."""
    if not INJECTOR.faults or INJECTOR._busy:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        where = _path(path)
        if _BELOW in where:
            INJECTOR.reach("file", f"open {where}")
            keeps = os.path.isfile(where) and not flags & os.O_TRUNC
            INJECTOR.unflushed.setdefault(where, os.path.getsize(where) if keeps else 0)
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        directory = arguments[2] if event in ("os.rename", "os.mkdir") else arguments[1]
        where = _path(arguments[0], directory)
        if _BELOW in where:
            INJECTOR.reach("file", f"{event[3:]} {where}")
            if event == "os.rename":
                _follow(where, _path(arguments[1], arguments[3] if len(arguments) > 3 else -1))


def _follow(source: str, target: str) -> None:
    """What is not flushed yet goes by its new name from now on."""
    for path in [path for path in INJECTOR.unflushed if path == source or path.startswith(source + os.sep)]:
        INJECTOR.unflushed[target + path[len(source) :]] = INJECTOR.unflushed.pop(path)


def _patch_files() -> None:
    """fsync and safetensors, which do not tell."""
    import safetensors.torch as tensors
    from safetensors import SafetensorError

    fsync, save_file = os.fsync, tensors.save_file

    def flush(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        where = os.readlink(f"/proc/self/fd/{number}")
        if f"{where}{os.sep}".find(_BELOW) >= 0:
            INJECTOR.reach("file", f"fsync {where}")
            INJECTOR.unflushed.pop(where, None)
        fsync(descriptor)

    def save(values: Any, filename: Any, *rest: Any, **more: Any) -> None:
        where = _path(filename)
        if INJECTOR.faults and _BELOW in where:
            INJECTOR.unflushed[where] = 0
            save_file(values, filename, *rest, **more)
            size = os.path.getsize(where)
            os.truncate(where, size // 2)  # as a crash in the middle leaves it
            try:
                INJECTOR.reach("file", f"write {where}")
            except OSError as error:  # safetensors is written in Rust and has an error of its own
                raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})") from None
        save_file(values, filename, *rest, **more)

    os.fsync, tensors.save_file = flush, save


def _before(module: str, name: str, point: str) -> None:
    """The function reaches `point` before it begins, under whatever name burnish's modules have imported it."""
    original = getattr(sys.modules[module], name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        INJECTOR.reach(point)
        return original(*arguments, **options)

    _replace(original, wrapped)


def _replace(original: Any, replacement: Any) -> None:
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "burnish"]:
        for name in [name for name, value in vars(module).items() if value is original]:
            setattr(module, name, replacement)


def _patch_training() -> None:
    import burnish.cli.train
    import burnish.run  # noqa: F401  # and with it all that trains
    from burnish.build import build_objective
    from burnish.engine.step import Stepper

    for module, name, point in (
        ("burnish.build", "build_policy", "load"),
        ("burnish.engine.evaluation", "evaluate", "evaluate"),
        ("burnish.engine.checkpoint", "save", "save"),
        ("burnish.engine.checkpoint", "prune", "prune"),
        ("burnish.models.save", "save_model", "export"),
        ("burnish.engine.report", "write_report", "report"),
    ):
        _before(module, name, point)

    _patch_steps(Stepper)

    def objective(*rest: Any, **more: Any) -> Any:
        import torch

        made = build_objective(*rest, **more)
        kind, call = type(made), type(made).__call__

        def loss(self: Any, policy: Any, batch: Any) -> Any:
            found = call(self, policy, batch)
            if torch.is_grad_enabled() and INJECTOR.reach("forward"):
                return dataclasses.replace(found, sum=found.sum * 1000)
            return found

        kind.__call__ = loss
        return made

    _replace(build_objective, objective)


def _patch_steps(stepper: Any) -> None:
    initialise, accumulate, update, restore = stepper.__init__, stepper.accumulate, stepper.update, stepper.restore

    def begin(self: Any, backend: Any, optimizer: Any, named_parameters: Any, *rest: Any, **more: Any) -> None:
        initialise(self, backend, optimizer, named_parameters, *rest, **more)
        INJECTOR.step = 1
        if INJECTOR.wants("backward"):
            parameters = list(named_parameters.values())
            parameters[len(parameters) // 2].register_hook(lambda grad: grad * float("nan") if INJECTOR.reach("backward") else None)
        if INJECTOR.wants("optimizer"):
            kind = type(optimizer)
            kind.step = _reaching(kind.step, "optimizer")

    def add(self: Any, *rest: Any, **more: Any) -> None:
        INJECTOR.step = self.step + 1
        INJECTOR.reach("step")
        accumulate(self, *rest, **more)

    def finish(self: Any) -> Any:
        INJECTOR.step = self.step + 1
        INJECTOR.reach("update")
        result = update(self)
        INJECTOR.step = self.step + 1
        return result

    def resume(self: Any, state: Any) -> None:
        restore(self, state)
        INJECTOR.step = self.step + 1

    stepper.__init__, stepper.accumulate, stepper.update, stepper.restore = begin, add, finish, resume


def _reaching(original: Callable[..., Any], point: str) -> Callable[..., Any]:
    def wrapped(self: Any, *rest: Any, **more: Any) -> Any:
        INJECTOR.reach(point)
        return original(self, *rest, **more)

    return wrapped


def install(faults: Sequence[Mapping[str, Any]]) -> None:
    """Puts faults into this process, whatever it goes on to run."""
    sys.addaudithook(_audit)
    _patch_files()
    _patch_training()
    INJECTOR.set(faults)


def _command(words: Sequence[str]) -> None:
    from burnish.cli.main import main

    sys.argv = ["burnish", *words]
    main()


def _serve() -> None:
    """Reads a request a line, tells who was started and who has ended."""
    running: set[int] = set()
    waiting = b""  # not sys.stdin, which would keep a second line in its buffer, where select does not see it
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        if ready:
            read = os.read(0, 1 << 16)
            if not read:
                break
            waiting += read
        *lines, waiting = waiting.split(b"\n")
        for line in lines:
            asked = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _child(asked)
            running.add(pid)
            print(json.dumps({"number": asked["number"], "pid": pid}), flush=True)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                print(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _child(asked: Mapping[str, Any]) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(asked["folder"])
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number in (1, 2):
            os.dup2(output, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(os.devnull)
        for name, value in asked["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        INJECTOR.set(asked["faults"])
        _command(asked["words"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Starts the command, or serves."""
    serving = sys.argv[1] == "--serve"
    install([] if serving else json.loads(sys.argv[1]))
    if serving:
        _serve()
    else:
        _command(sys.argv[2:])


if __name__ == "__main__":
    main()
