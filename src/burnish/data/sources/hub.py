"""Data sets of the Hugging Face hub, through the library `datasets` (which also keeps the downloads).

`datasets` is imported inside the functions that need it: it takes a second to import, and most runs and all checks read local files.
"""

# `datasets` has no type stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from burnish.core import hub
from burnish.core.errors import BurnishError, SourceError, Where, did_you_mean
from burnish.data.sources.columnar import pruned
from burnish.data.sources.row import Row


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a hub data set. Rows come from the downloaded Arrow files, or with `streaming` as they arrive."""

    path: str
    subset: str | None
    revision: str | None
    split: str
    streaming: bool = False

    @property
    def shown(self) -> str:
        """Its name in messages: `owner/name:subset[split]`."""
        return f"{_shown(self.path, self.subset)}[{self.split}]"

    def rows(self) -> Iterator[Row]:
        """All rows, in order.

        Raises:
            SourceError: when the hub cannot be reached, or has no such data set.
        """
        import datasets

        with _explained(self.shown):
            table: Any = datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=self.streaming)
            for number, fields in enumerate(table, start=1):
                yield Row(self.shown, number, {name: pruned(value) for name, value in fields.items()})

    def fingerprint(self) -> bytes:
        """What `datasets` derives from the commit (for a local copy: from its files), the subset and the split."""
        import datasets

        with _explained(self.shown):
            builder = datasets.load_dataset_builder(self.path, self.subset, revision=self.revision)
            return f"{self.shown}@{builder.hash}".encode()


def hub_splits(path: str, subset: str | None, revision: str | None, *, streaming: bool) -> dict[str, HubSplit]:
    """The splits of a hub data set by name.

    Raises:
        SourceError: when there is no such data set, subset or revision, or no way to the hub; when a subset must be chosen.
    """
    import datasets

    if hub.silence():
        hub.note_silence()
        datasets.logging.set_verbosity_error()  # it would say the same again, at every step
    with _explained(_shown(path, subset)):
        subsets: list[str] = datasets.get_dataset_config_names(path, revision=revision)
        chosen = subset or datasets.get_dataset_default_config_name(path, revision=revision)
        if chosen not in subsets:
            raise _which_subset(path, subset, subsets)
        names: list[str] = datasets.get_dataset_split_names(path, chosen, revision=revision)
    return {name: HubSplit(path, subset, revision, name, streaming) for name in names}


def _which_subset(path: str, subset: str | None, subsets: list[str]) -> SourceError:
    where = Where(path, field="name")
    if subset is None:
        hint = f"Write for instance 'name: {subsets[0]}'."
        return SourceError(f"the data set has several subsets and none by default ({', '.join(subsets)})", where=where, hint=hint)
    return SourceError(f"there is no subset '{subset}': {did_you_mean(subset, subsets)}", where=where)


def _shown(path: str, subset: str | None) -> str:
    return f"{path}:{subset}" if subset else path


@contextmanager
def _explained(shown: str) -> Generator[None]:
    where = Where(shown)
    try:
        yield
    except BurnishError:
        raise
    except Exception as error:  # network libraries raise exceptions of their own
        if refused := hub.refusal(error, shown, "data set"):
            raise SourceError(refused[0], hint=refused[1]) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"is neither a file here nor a data set that the hub hands out ({reason})",
            where=where,
            hint="Check the name; private data sets need 'hf auth login', and a machine without network a local copy.",
        ) from None
