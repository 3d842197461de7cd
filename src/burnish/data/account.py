"""The account of the data: what became of every row and every token.

Each row that is read has exactly one fate, so that

    read == kept + eval + duplicate + empty + malformed + dropped + fully_masked

and each token that is rendered is in exactly one place:

    rendered == total + eval + truncated + dropped + fully_masked + duplicate          total == trained + masked
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from burnish.core.log import counted
from burnish.data.visible import plain

MOST_PLACES = 100  # malformed rows whose place is remembered; the rest is only counted


@dataclass(slots=True)
class Rows:
    """Counts of rows."""

    read: int = 0
    kept: int = 0  # trained on
    eval: int = 0  # held out
    duplicate: int = 0
    empty: int = 0  # nothing in them
    malformed: int = 0
    overlong: int = 0  # longer than max_length, whatever was done about it
    dropped: int = 0  # left out because they are overlong
    fully_masked: int = 0  # left out because no token of theirs is trained
    masked_by_truncation: int = 0  # those of them that would have had trained tokens, had they not been cut

    @property
    def balanced(self) -> bool:
        """Whether every row that was read has exactly one fate."""
        return self.read == (self.kept + self.eval + self.duplicate + self.empty + self.malformed + self.dropped + self.fully_masked)


@dataclass(slots=True)
class Tokens:
    """Counts of tokens."""

    rendered: int = 0  # of all rows that could be read, before anything was cut or left out
    total: int = 0  # trained on or given as context
    trained: int = 0
    masked: int = 0
    eval: int = 0
    truncated: int = 0
    dropped: int = 0
    fully_masked: int = 0
    duplicate: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every token is in exactly one place."""
        places = self.total + self.eval + self.truncated + self.dropped + self.fully_masked + self.duplicate
        return self.rendered == places and self.total == self.trained + self.masked


Counts = TypeVar("Counts", Rows, Tokens)


@dataclass(slots=True)
class SourceAccount:
    """The account of one source."""

    name: str
    format: str
    rows: Rows = field(default_factory=Rows)
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Where a row could not be read, and why."""

    file: str
    row: int
    reason: str


@dataclass(slots=True)
class Lengths:
    """How long the examples are, in tokens. `histogram` holds (from, to inclusive, examples)."""

    min: int = 0
    mean: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    max: int = 0
    histogram: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    @classmethod
    def of(cls, lengths: Sequence[int] | npt.NDArray[np.int32]) -> Lengths:
        """Summarises lengths [N]; the bars are a power of two wide, at most sixteen of them."""
        if not len(lengths):
            return cls()
        sizes = np.asarray(lengths, np.int64)
        longest = int(sizes.max())
        width = 1
        while width * 16 < longest:
            width *= 2
        counts = np.bincount((sizes - 1) // width)
        bars = [(place * width + 1, (place + 1) * width, int(count)) for place, count in enumerate(counts.tolist())]
        return cls(
            min=int(sizes.min()),
            mean=round(float(sizes.mean()), 2),
            median=float(np.median(sizes)),
            p95=round(float(np.percentile(sizes, 95)), 1),
            max=longest,
            histogram=bars,
        )


@dataclass(slots=True)
class Packing:
    """How full the bins are when the whole data set is packed into bins of `bin_size` tokens."""

    bin_size: int
    bins: int
    fullness: float


@dataclass(slots=True)
class Account:
    """What became of every row and token. `evaluation` is the account of eval sources of their own, whose kept rows are held out."""

    sources: list[SourceAccount] = field(default_factory=list[SourceAccount])
    malformed: list[Malformed] = field(default_factory=list[Malformed])
    notes: Counter[str] = field(default_factory=Counter[str])  # what the template left out and the like, see `data.render.NOTES`
    examples: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    packing: Packing | None = None
    evaluation: Account | None = None
    eval_rows_also_in_train: int = 0

    @property
    def rows(self) -> Rows:
        """Rows of all sources."""
        return _sum(Rows, [source.rows for source in self.sources])

    @property
    def tokens(self) -> Tokens:
        """Tokens of all sources."""
        return _sum(Tokens, [source.tokens for source in self.sources])

    def note(self, malformed: Malformed) -> None:
        """Remembers the place of a malformed row, up to a limit; counting is the source's part."""
        if len(self.malformed) < MOST_PLACES:
            self.malformed.append(malformed)

    def to_json(self) -> dict[str, Any]:
        """The account as `data.json` holds it and `burnish data --json` prints it."""
        return {
            "rows": asdict(self.rows),
            "tokens": asdict(self.tokens),
            "examples": self.examples,
            "lengths": asdict(self.lengths),
            "packing": asdict(self.packing) if self.packing else None,
            "sources": [asdict(source) for source in self.sources],
            "malformed": [asdict(place) for place in self.malformed],
            "notes": dict(self.notes),
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
            "eval_rows_also_in_train": self.eval_rows_also_in_train,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Account:
        """The account that `to_json` wrote."""
        return cls(
            sources=[
                SourceAccount(source["name"], source["format"], Rows(**source["rows"]), Tokens(**source["tokens"]))
                for source in document["sources"]
            ],
            malformed=[Malformed(**place) for place in document["malformed"]],
            notes=Counter(document["notes"]),
            examples=document["examples"],
            lengths=_lengths_from(document["lengths"]),
            packing=Packing(**document["packing"]) if document["packing"] else None,
            evaluation=cls.from_json(document["evaluation"]) if document["evaluation"] else None,
            eval_rows_also_in_train=document["eval_rows_also_in_train"],
        )

    def table(self) -> RenderableType:
        """The account for the console: rows, tokens, and the first malformed places."""
        grid = Table(box=None, pad_edge=False, show_header=False)
        grid.add_column()
        grid.add_column(justify="right")
        grid.add_column(style="dim")
        for name, count, remark in self.lines():
            grid.add_row(name, count, remark)
        parts: list[RenderableType] = [_source_table(self.sources), grid] if len(self.sources) > 1 else [grid]
        parts += [Text(plain(f"malformed: {place.file}, row {place.row}: {place.reason}"), style="yellow") for place in self.malformed[:5]]
        parts += [Text(f"{name.replace('_', ' ')}: {count:,}", style="yellow") for name, count in self.notes.items()]
        if self.evaluation is not None:
            parts += [Text("\nevaluation", style="bold"), self.evaluation.table()]
        if self.eval_rows_also_in_train:
            parts.append(Text(f"{self.eval_rows_also_in_train:,} eval rows are also trained on", style="yellow"))
        return Group(*parts)

    def line(self) -> str:
        """The account in one line: what is trained on, then whatever was lost and why."""
        rows, tokens = self.rows, self.tokens
        trained = f"{tokens.trained:,} trained ({share(tokens.trained, tokens.total)})"
        held_out = rows.eval + (self.evaluation.rows.kept if self.evaluation else 0)
        parts = [f"{counted(self.examples, 'example')}, {tokens.total:,} tokens, {trained}"]
        parts += [f"{counted(held_out, 'row')} held out"] if held_out else []
        if long := rows.overlong - rows.dropped:
            cut = f" ({tokens.truncated:,} tokens cut off)" if tokens.truncated else ""
            parts.append(f"{counted(long, 'row')} longer than data.max_length{cut}")
        masked = "fully masked" + (f" ({rows.masked_by_truncation:,} cut before the answer)" if rows.masked_by_truncation else "")
        fates = [(rows.dropped, "too long"), (rows.duplicate, "duplicate"), (rows.empty, "empty"), (rows.malformed, "malformed")]
        parts += [f"{counted(self.notes[name], noun)} {words}" for name, (noun, words) in _DOUBTFUL.items() if self.notes[name]]
        if left_out := [f"{count:,} {name}" for count, name in [*fates, (rows.fully_masked, masked)] if count]:
            parts.append(f"left out: {', '.join(left_out)}")
        return f"data: {'; '.join(parts)}"

    def lines(self) -> list[tuple[str, str, str]]:
        """The account in lines for people: what, how much, a remark. Fates that nothing met are left out."""
        return [*_row_lines(self.rows), *_token_lines(self.tokens), *self._packing_lines()]

    def _packing_lines(self) -> list[tuple[str, str, str]]:
        if self.packing is None:
            return []
        return [("bins when packed", f"{self.packing.bins:,}", f"of {self.packing.bin_size:,} tokens, {self.packing.fullness:.1%} full")]


_DOUBTFUL = {
    "equal_answers": ("pair", "with equal answers"),
    "different_prompts": ("pair", "with different prompts"),
    "words_run_together": ("row", "without a space between prompt and answer"),
}
"""Notes that say that rows are probably not what was meant."""


def _lengths_from(document: Mapping[str, Any]) -> Lengths:
    bars = [(int(start), int(end), int(count)) for start, end, count in document["histogram"]]
    return Lengths(**{name: value for name, value in document.items() if name != "histogram"}, histogram=bars)


def _row_lines(rows: Rows) -> list[tuple[str, str, str]]:
    """The lines about rows; a fate that no row had is not shown."""
    because = f"{rows.masked_by_truncation:,} of them cut before the answer" if rows.masked_by_truncation else "no trained token"
    optional = [
        ("  held out for eval", rows.eval, ""),
        ("  duplicate", rows.duplicate, "left out"),
        ("  empty", rows.empty, "left out"),
        ("  malformed", rows.malformed, "left out"),
        ("  fully masked", rows.fully_masked, f"left out: {because}"),
        ("  dropped", rows.dropped, "left out: longer than data.max_length"),
        ("  overlong", rows.overlong, "longer than data.max_length"),
    ]
    shown = [(name, f"{count:,}", remark) for name, count, remark in optional if count]
    return [("rows read", f"{rows.read:,}", ""), ("  kept", f"{rows.kept:,}", share(rows.kept, rows.read)), *shown]


def _token_lines(tokens: Tokens) -> list[tuple[str, str, str]]:
    lost = [("held out for eval", tokens.eval), ("truncated", tokens.truncated), ("dropped", tokens.dropped)]
    lost += [("in masked rows or pieces", tokens.fully_masked), ("duplicate", tokens.duplicate)]
    return [
        ("tokens", f"{tokens.total:,}", ""),
        ("  trained", f"{tokens.trained:,}", share(tokens.trained, tokens.total)),
        ("  masked", f"{tokens.masked:,}", share(tokens.masked, tokens.total)),
        *[(f"  {name}", f"{count:,}", "not among the tokens above") for name, count in lost if count],
    ]


def _source_table(sources: Iterable[SourceAccount]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("source", "format"):
        table.add_column(name)
    for name in ("rows read", "kept", "tokens", "trained"):
        table.add_column(name, justify="right")
    for source in sources:
        counts = (source.rows.read, source.rows.kept, source.tokens.total, source.tokens.trained)
        table.add_row(Text(plain(source.name)), source.format, *[f"{count:,}" for count in counts])
    return table


def share(part: int, whole: int) -> str:
    """A percentage for people, or nothing where there is no whole."""
    return f"{part / whole:.1%}" if whole else ""


def _sum(kind: type[Counts], parts: Sequence[Counts]) -> Counts:
    return kind(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(kind)})
