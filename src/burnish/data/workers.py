"""Processes that prepare chunks of rows.

A worker is a fresh Python process that runs `main` of this module and is spoken to through pipes. Why so, and not by `multiprocessing`:

- fork would copy a process whose threads (of the tokenizer, Arrow, torch) hold locks that nobody in the child will ever release;
- spawn and forkserver import the user's main script again, so `burnish.train(...)` in a script without an `if __name__ == "__main__"`
  guard, or in a notebook, would start itself over and over;
- when a worker dies, the pipe ends at once, and a byte of shared memory says on which row it was. Pools of the standard library can tell
  neither.

Results are taken in the order of the chunks, and what becomes of a chunk depends on its rows alone, so the outcome is bit-equal for any
number of workers.
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import IO, Literal, cast

from burnish.core.errors import BurnishError, DataError, Where
from burnish.core.signals import POLITE
from burnish.data.pipeline import CHUNK_ROWS, Chunk, Pipeline, Task

_PLACE = struct.Struct("<q")
_SMALL = 8 * CHUNK_ROWS  # so many rows are prepared sooner than a worker starts (a second or two of imports)
_MOST = 32
# Not `-m`: classes of this module would then belong to `__main__` and could not be sent back.
# Signals reach every process of a terminal, a batch job or a service; the main one alone decides what to do. From the first moment on,
# since the imports take a second or two.
_START = f"import signal; [signal.signal(n, signal.SIG_IGN) for n in {[int(n) for n in POLITE]}]; from {__name__} import main; main()"


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception that was raised in a worker, on its way to the main process."""

    error: BurnishError | None
    text: str  # the traceback, for exceptions that are not the input's fault


def prepared(tasks: Iterator[list[Task]], pipeline: Pipeline, workers: int | Literal["auto"]) -> Generator[tuple[list[Task], Chunk]]:
    """Prepares chunks in as many processes as asked for, and gives them back in order.

    `auto` begins in this process, because most data sets are done before a worker has started, and goes on with a worker for each core.

    Raises:
        DataError: a malformed row, or a worker that died.
    """
    if workers == "auto":
        for chunk in islice(tasks, _SMALL // CHUNK_ROWS):
            yield chunk, pipeline.run(chunk)
    count = cores() if workers == "auto" else workers
    if count <= 1:
        for chunk in tasks:
            yield chunk, pipeline.run(chunk)
        return
    first = next(tasks, None)
    if first is None:
        return
    with Workers(pipeline, count) as pool:
        pending = deque([(first, pool.submit(first))])
        for chunk in tasks:
            pending.append((chunk, pool.submit(chunk)))
            if len(pending) >= 2 * count:
                done, result = pending.popleft()
                yield done, result.result()
        while pending:
            done, result = pending.popleft()
            yield done, result.result()


def cores() -> int:
    """The cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST)


class Workers:
    """A number of worker processes; a context manager. One thread for each speaks with it."""

    def __init__(self, pipeline: Pipeline, count: int) -> None:
        self._all = [_Worker(pipeline) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenise")

    def submit(self, chunk: list[Task]) -> Future[Chunk]:
        """Gives a chunk to the next idle worker."""
        return self._threads.submit(self._run, chunk)

    def _run(self, chunk: list[Task]) -> Chunk:
        worker = self._idle.get()
        try:
            return worker.run(chunk)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        """The workers run already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends them; at once when something went wrong, for they hold nothing that could be lost."""
        for worker in self._all:
            worker.end(kill=kind is not None)
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.clear()


class _Worker:
    """One process, as the main process sees it."""

    def __init__(self, pipeline: Pipeline) -> None:
        descriptor, self._beat_file = tempfile.mkstemp(prefix="burnish-worker-")
        self._beat = os.fdopen(descriptor, "w+b")
        self._beat.write(_PLACE.pack(-1))
        self._beat.flush()
        self._process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
        self._hello: bytes | None = pickle.dumps((pipeline, self._beat_file))

    def run(self, chunk: list[Task]) -> Chunk:
        """Has a chunk prepared.

        Raises:
            DataError: what the worker raised, or that it died.
        """
        stdin, stdout = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        try:
            if self._hello is not None:
                stdin.write(self._hello)
                self._hello = None
            pickle.dump(chunk, stdin, protocol=pickle.HIGHEST_PROTOCOL)
            stdin.flush()
            answer: Chunk | Failure = pickle.load(stdout)
        except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise self._death(chunk) from error
        if isinstance(answer, Failure):
            raise answer.error if answer.error is not None else RuntimeError(f"a tokenising worker failed:\n{answer.text}")
        return answer

    def end(self, *, kill: bool) -> None:
        """Ends the process: by the end of its input, or at once."""
        if kill:
            self._process.kill()
        else:
            self._close(self._process.stdin)
        self._process.wait()

    def clear(self) -> None:
        """Gives back what the process used; no thread may speak with it any more."""
        self._close(self._process.stdin)
        self._close(self._process.stdout)
        self._beat.close()
        with suppress(FileNotFoundError):  # the worker has removed it, if it lived long enough
            os.unlink(self._beat_file)

    @staticmethod
    def _close(stream: IO[bytes] | None) -> None:
        with suppress(OSError):  # the process died with something unread in its pipe, which was reported already
            if stream is not None:
                stream.close()

    def _death(self, chunk: list[Task]) -> DataError:
        code = self._process.wait()
        cause = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        self._beat.seek(0)
        place: int = _PLACE.unpack(self._beat.read(_PLACE.size))[0]
        first, last = chunk[0].row, chunk[-1].row
        held = f"{first.file}, row {first.number} to {last.file}, row {last.number}"
        if place < 0:
            return DataError(f"a tokenising worker died before it began to work on its rows ({cause}): {held}")
        row = chunk[place].row
        hint = "SIGKILL mostly means that memory ran out: set data.workers to a smaller number." if code == -9 else None
        return DataError(
            f"a tokenising worker died on this row ({cause}); it held {held}", where=Where(row.file, row=row.number), hint=hint
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """What a worker inherits: the same modules, and one thread, since there is a worker for every core."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """A worker's life: read the pipeline, then answer chunks until the pipe ends (also when the main process is killed)."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    questions = sys.stdin.buffer
    try:
        pipeline, beat_file = pickle.load(questions)
        with open(beat_file, "r+b") as stream, mmap.mmap(stream.fileno(), _PLACE.size) as beat:
            with suppress(OSError):  # an open file can lose its name on Unix, so that nothing stays behind whoever is killed
                os.unlink(beat_file)
            while True:
                chunk = pickle.load(questions)
                pickle.dump(_answer(pipeline, chunk, beat), answers, protocol=pickle.HIGHEST_PROTOCOL)
                answers.flush()
    except (EOFError, BrokenPipeError):
        return


def _answer(pipeline: Pipeline, chunk: list[Task], beat: mmap.mmap) -> Chunk | Failure:
    try:
        answer = pipeline.run(chunk, lambda place: _PLACE.pack_into(beat, 0, place))
        _PLACE.pack_into(beat, 0, -1)
        return answer
    except BurnishError as error:
        return Failure(error, "")
    except Exception:
        return Failure(None, traceback.format_exc())
