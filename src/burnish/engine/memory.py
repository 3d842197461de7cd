"""Memory runs out in a step: the step is repeated in smaller micro-batches.

The mathematics stays. The repeated step has the same examples, the same dropout states to begin with and the same weight to divide by; only
the order of additions is another.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch

from burnish.config.sections import Recovery
from burnish.core.errors import TrainingError
from burnish.core.log import warn
from burnish.data.types import Batch, Recut, Source
from burnish.engine import rng
from burnish.engine.backend import Backend
from burnish.engine.events import State
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
        step: Which step it is.
        swallow: Otherwise the run ends with a TrainingError.
    """

    def __init__(self, batches: Sequence[Batch], step: int, *, swallow: bool) -> None:
        self.batches = batches
        self.step = step
        self.failed = False
        self._swallow = swallow

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        if not self._swallow:
            largest = max(len(batch.input_ids) for batch in self.batches)
            raise TrainingError(
                f"memory ran out in step {self.step}, in micro-batches of up to {largest:,} tokens", hint=_LESS_MEMORY
            ) from error
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
    """

    def __init__(self, backend: Backend, source: Source, stepper: Stepper, state: State, recovery: Recovery) -> None:
        self._backend = backend
        self._source = source if isinstance(source, Recut) else None
        self._stepper = stepper
        self._state = state
        self._swallow = recovery.out_of_memory == "halve" and stepper.repeatable and self._source is not None and not backend.coupled
        if self._source is not None:
            self._source.halve(state.halvings)

    def attempts(self, batches: Sequence[Batch]) -> Iterator[Attempt]:
        """Tries for the loop to compute: one, and another one as long as the last has failed.

        Raises:
            TrainingError: memory runs out with one example at a time.
        """
        while True:
            random_states = rng.capture() if self._swallow else None
            attempt = Attempt(batches, self._state.step + 1, swallow=self._swallow)
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

        One process decides that alone. Several would have to agree amid their collectives, and stop instead.
        """
        again = self._swallow and self._backend.world_size == 1 and is_out_of_memory(error)
        if again and self._source is not None and self._source.micro_batch_tokens > 1:
            self._halved("in an evaluation")
            return True
        return False

    def _halved(self, where: str) -> Recut:
        assert self._source is not None
        self._state.halvings += 1
        self._source.halve(1)
        size = f"micro-batches of at most {self._source.micro_batch_tokens:,} tokens"
        warn(f"memory ran out {where}: it is computed once more in {size}, and so is all that follows")
        return self._source
