"""Memory runs out in a step: the step is repeated in smaller micro-batches.

The mathematics stays. The repeated step has the same examples, the same dropout states to begin with and the same weight to divide by; only
the order of additions is another.

Ranks that wait for each other within a micro-batch (shards, shared tokens, shared layers) cannot leave it alone. There the run ends, and
leaves a note in its folder (`memory.json`): the next start goes on from the newest checkpoint in smaller micro-batches. `engine.launcher`
makes that start by itself.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from burnish.config.sections import Recovery
from burnish.core.errors import TrainingError
from burnish.core.log import info, warn
from burnish.data.types import Batch, Recut, Source
from burnish.engine import rng
from burnish.engine.backend import Backend
from burnish.engine.events import State
from burnish.engine.launcher import MEMORY_NOTE
from burnish.engine.step import Stepper, is_out_of_memory

__all__ = ["Attempt", "Memory"]


_LESS_MEMORY = (
    "lower train.micro_batch_tokens or data.max_length, set train.checkpoint_activations: on, or choose a smaller model, "
    "model.quantize or an adapter"
)


class Attempt:
    """One try at the gradient of a step. As a context it swallows the error of memory that ran out, and remembers it.

    Args:
        batches: The micro-batches.
        ends: What the run ends with where the error is not swallowed; None where it is.
    """

    def __init__(self, batches: Sequence[Batch], *, ends: Callable[[Sequence[Batch]], TrainingError] | None) -> None:
        self.batches = batches
        self.failed = False
        self._ends = ends

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        if self._ends is not None:
            raise self._ends(self.batches) from error
        self.failed = True
        return True


class Memory:
    """Repeats a step that ran out of memory in micro-batches of half the tokens, and again, until it fits.

    Args:
        backend: Devices; all ranks repeat a step where one of them has to.
        source: Where the micro-batches come from. One that cannot cut its present step again is left alone.
        stepper: Of the run.
        state: Of the run; `halvings` is kept there, so that a resumed run starts with what fitted.
        recovery: The section of the run file.
        folder: The run folder.
    """

    def __init__(self, backend: Backend, source: Source, stepper: Stepper, state: State, recovery: Recovery, folder: Path) -> None:
        self._backend = backend
        self._source = source if isinstance(source, Recut) else None
        self._stepper = stepper
        self._state = state
        self._halves = recovery.out_of_memory == "halve" and stepper.repeatable and self._source is not None
        self._swallow = self._halves and not backend.coupled
        self._note = folder / MEMORY_NOTE
        self._asked = self._source.micro_batch_tokens if self._source is not None else 0
        if self._source is not None:
            self._heed()
            self._source.halve(state.halvings)

    def attempts(self, batches: Sequence[Batch]) -> Iterator[Attempt]:
        """Tries for the loop to compute: one, and another one as long as the last has failed.

        Raises:
            TrainingError: memory runs out with one example at a time.
        """
        while True:
            random_states = rng.capture() if self._swallow else None
            attempt = Attempt(batches, ends=None if self._swallow else self._ended)
            yield attempt
            if random_states is None or not self._backend.any(attempt.failed):
                return
            self._stepper.abandon()
            batches = self._smaller(attempt)
            rng.restore(random_states)

    def _smaller(self, attempt: Attempt) -> Sequence[Batch]:
        several = self._backend.any(any(batch.examples > 1 for batch in attempt.batches))
        longest = max(int(value) for value in self._backend.gather(max(len(batch.input_ids) for batch in attempt.batches)))
        attempt.batches = ()
        gc.collect()
        if self._backend.device.type == "cuda":
            torch.cuda.empty_cache()
        if not several:
            raise TrainingError(
                f"memory ran out in step {self._state.step + 1} with one example of {longest:,} tokens at a time",
                hint=_LESS_MEMORY,
            )
        return self._halved(f"in step {self._state.step + 1}").again()

    def evaluates_again(self, error: BaseException) -> bool:
        """Whether an evaluation that ended with this error is to be repeated; micro-batches are smaller then.

        One process decides that alone. Several would have to agree amid their collectives: they stop, to begin again smaller.

        Raises:
            TrainingError: they do.
        """
        again = self._halves and is_out_of_memory(error) and self._source is not None and self._source.micro_batch_tokens > 1
        if again and self._backend.world_size > 1:
            said = "memory ran out in an evaluation"
            raise TrainingError(said, hint=self._leave_note(said)) from error
        if again:
            self._halved("in an evaluation")
        return again

    def forget(self) -> None:
        """Removes the note, at the end of the run."""
        if self._backend.is_main:
            with suppress(OSError):
                self._note.unlink(missing_ok=True)

    def _ended(self, batches: Sequence[Batch]) -> TrainingError:
        """What the run ends with when memory has run out in these micro-batches."""
        largest = max(len(batch.input_ids) for batch in batches)
        several = self._halves and any(batch.examples > 1 for batch in batches)
        said = f"memory ran out in step {self._state.step + 1}, in micro-batches of up to {largest:,} tokens"
        return TrainingError(said, hint=self._leave_note(said) if several else _LESS_MEMORY)

    def _leave_note(self, said: str) -> str:
        """For the next start; returns what it will do."""
        who = f"rank {self._backend.rank}: {said}"
        note = {"micro_batch_tokens": self._asked, "halvings": self._state.halvings + 1, "said": who}
        unfinished = self._note.with_name(f"{self._note.name}.{self._backend.rank}")
        try:
            unfinished.write_text(json.dumps(note), encoding="utf-8")
            unfinished.replace(self._note)
        except OSError:
            return _LESS_MEMORY
        return "the same command goes on from the newest checkpoint, in micro-batches of half as many tokens"

    def _heed(self) -> None:
        """Takes over what the last start has noted, if it was asked for micro-batches of this size."""
        noted = 0
        with suppress(OSError, ValueError, LookupError, TypeError):
            found = json.loads(self._note.read_text(encoding="utf-8")) if self._backend.is_main else {}
            noted = int(found["halvings"]) if found["micro_batch_tokens"] == self._asked else 0
        noted = self._backend.from_main(noted)
        if noted > self._state.halvings:
            self._state.halvings = noted
            info(
                f"memory ran out before: micro-batches have at most {max(1, self._asked >> noted):,} tokens now, instead of {self._asked:,}"
            )

    def _halved(self, where: str) -> Recut:
        assert self._source is not None
        self._state.halvings += 1
        self._source.halve(1)
        size = f"micro-batches of at most {self._source.micro_batch_tokens:,} tokens"
        warn(f"memory ran out {where}: it is computed once more in {size}, and so is all that follows")
        return self._source
