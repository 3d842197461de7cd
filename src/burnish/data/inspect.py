"""What is trained on, for people to see: an account, a histogram of lengths, and rows with their trained tokens in colour.

Text of the data set is never trusted: see `visible.py` for the terminal; in the page everything is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from burnish.config.sections import Data
from burnish.core.errors import DataError, Where, did_you_mean
from burnish.data.account import Account, Lengths, share
from burnish.data.pipeline import Renderer, Task
from burnish.data.prepare import OpenSet, open_set, pipeline_of
from burnish.data.tree import is_tree, segments_of, trained_counts, usable
from burnish.data.types import BatchKind, Example
from burnish.data.visible import plain, visible

_Value = TypeVar("_Value")
_BAR_WIDTH = 40
_UNFINISHED = "\ufffd"  # what a tokenizer decodes the bytes of half a character to


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Id -> token, with `special`, of the tokens that are matched whole."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Ids to text."""
        ...


@dataclass(frozen=True, slots=True)
class Shown:
    """An example with what it takes to show it. All lists have one entry for each token."""

    file: str
    row: int
    ids: list[int] = field(default_factory=list[int])
    trained: list[int] = field(default_factory=list[int])  # 1 or 0
    tokens: list[str] = field(default_factory=list[str])  # joined, they are the decoded text
    special: list[bool] = field(default_factory=list[bool])
    parts: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])  # name and end of each segment, where there are several
    remark: str = ""

    @property
    def title(self) -> str:
        """Where the example comes from, and how much of it is trained."""
        counts = f"{len(self.ids):,} tokens, {sum(self.trained):,} trained ({share(sum(self.trained), len(self.ids)) or 'nothing'})"
        return f"{self.file}, row {self.row}: {counts}{f'; {self.remark}' if self.remark else ''}"

    def to_json(self) -> dict[str, Any]:
        """What `burnish data --row N --json` prints."""
        segments = {"segments": [{"name": name, "end": end} for name, end in self.parts]} if self.parts else {}
        return {"ids": self.ids, "trained": self.trained, "tokens": self.tokens} | segments

    def cut(self, values: Sequence[_Value]) -> Iterator[tuple[str, Sequence[_Value]]]:
        """Name and share of `values` (one for each token) of every segment; one without a name where the example is plain."""
        start = 0
        for name, end in self.parts or [("", len(values))]:
            yield name, values[start:end]
            start = end


def show(examples: Sequence[Example], tokenizer: Tokenizer, origin: tuple[str, int], remark: str = "") -> Shown:
    """Makes one row's examples (several where an overlong row is split) ready to be shown."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown = Shown(*origin, remark=remark)
    for example in examples:
        ids = [int(token) for token in example.input_ids]
        shown.parts.extend((name, len(shown.ids) + end) for name, end in zip(_names(example), example.ends, strict=True))
        shown.ids.extend(ids)
        shown.trained.extend(trained_flags(example))
        for start, end, _ in segments_of(example):
            shown.tokens.extend(token_texts(ids[start:end], tokenizer))
        shown.special.extend(token in special for token in ids)
    return shown


def _names(example: Example) -> list[str]:
    """What the segments of a tree are."""
    if not is_tree(example):
        return []
    before = ["prompt"] if trained_counts(example)[0] == 0 else []
    following = len(example.ends) - len(before)
    if len(example.values) == 1 and following == 2:
        margin = f", margin {example.values[0]:g}" if example.values[0] else ""
        return [*before, f"chosen{margin}", "rejected"]
    if len(example.values) == 1:
        return [*before, "good answer" if example.values[0] else "bad answer"]
    judged = ("right" if value else "wrong" for value in example.values)
    return [*before, *(f"step {number}, {word}" for number, word in enumerate(judged, start=1))]


def trained_flags(example: Example) -> list[int]:
    """1 for every token that is trained; the first of a root never is, since nothing comes before it that could predict it."""
    flags = (example.weights > 0).astype(int)
    for start, _, parent in segments_of(example):
        if parent < 0:
            flags[start : start + 1] = 0
    return flags.tolist()


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds.

    Tokens are decoded together with those before them, since some tokenizers drop a leading space at the beginning of a text. Where a
    character is spread over several tokens, the last of them has it and the others are empty.
    """
    texts: list[str] = []
    start, done = 0, 0  # tokens start..done are decoded already and serve as context
    for end in range(1, len(ids) + 1):
        before, now = _decode(tokenizer, ids[start:done]), _decode(tokenizer, ids[start:end])
        unfinished = now.endswith(_UNFINISHED) and end < len(ids) and end - done < 4  # no character has more than four bytes
        if unfinished or len(now) <= len(before):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, end
    return texts


def row_number(
    data: Data,
    renderer: Renderer,
    tokenizer: Tokenizer,
    number: int,
    *,
    seed: int,
    kind: BatchKind = "tokens",
    file: str | None = None,
    base: Path = Path(),
) -> Shown:
    """The row that `--row` asks for, prepared as for training.

    Args:
        data: The section of the run file.
        renderer: Turns items into tokens.
        tokenizer: To show them.
        number: With `file`, the row's number in it, as messages name it. Without, rows count from 1 through all sources in turn, whatever
            order `data.mix` gives them; where there is one file, that is the same.
        seed: Of the run, which decides samples and mixing.
        kind: What the objective compares.
        file: Which file is meant: its path, or the last part of it.
        base: The run file's folder, for formats in files of the user's own.

    Raises:
        DataError: there is no such row, or it cannot be prepared.
    """
    opened = open_set(data.train, kind, seed=seed, base=base)
    pipeline = pipeline_of(data, opened, renderer)
    task = _find(opened, number, file)
    origin, where = (task.row.file, task.row.number), task.row.where()
    remarks = [f"number {number:,} through all files in turn"] if number != task.row.number else []
    remarks += _mixed(opened, data, seed, task)
    item = pipeline.item(task)
    if item is None:
        return show([], tokenizer, origin, ", ".join([*remarks, "empty, left out"]))
    examples = pipeline.render(item, where=where)
    try:
        pieces = [pipeline.fit(example) for example in examples]
    except DataError as error:
        raise DataError(error.message, where=where, hint=error.hint) from error
    for example, own in zip(examples, pieces, strict=True):
        remarks += _remarks(example, own)
    return show([piece for own in pieces for piece in own], tokenizer, origin, ", ".join(dict.fromkeys(remarks)))


def _find(opened: OpenSet, number: int, file: str | None) -> Task:
    count = 0
    files: list[str] = []
    for place, source in enumerate(opened.sources):
        for row in source.rows():
            count += 1
            if not files or files[-1] != row.file:
                files.append(row.file)
            if file is not None:
                if row.number == number and _is_called(row.file, file):
                    return Task(place, row)
                continue
            # Under a split such as train[100:] the number in the file is the one that messages name.
            named_by_file = len(opened.sources) == 1 and row.file == files[0]
            if number == (row.number if named_by_file else count):
                return Task(place, row)
    if file is not None and not any(_is_called(name, file) for name in files):
        names = list(dict.fromkeys(Path(name).name for name in files))
        raise DataError(f"there is no file '{file}' among the sources of data.train; {did_you_mean(file, names)}")
    if file is not None:
        raise DataError(f"there is no row {number:,}", where=Where(file))
    names = ", ".join(source.name for source in opened.sources)
    raise DataError(f"there is no row {number:,}: {count:,} rows were read", where=Where(names))


def _is_called(path: str, name: str) -> bool:
    return path == name or path.endswith(f"/{name}")


def _mixed(opened: OpenSet, data: Data, seed: int, task: Task) -> list[str]:
    """How often `data.mix` takes a row, where it is not once."""
    if len(opened.sources) == 1 or data.mix in ("proportional", "round_robin"):
        return []
    uses = sum(
        (one.source, one.row.file, one.row.number) == (task.source, task.row.file, task.row.number) for one in opened.tasks(data, seed)
    )
    if uses == 1:
        return []
    return [f"{uses} times in an epoch by data.mix: {data.mix}"] if uses else [f"not used: data.mix: {data.mix} ends before it"]


def _remarks(example: Example, pieces: Sequence[Example]) -> list[str]:
    length, left = len(example.input_ids), sum(len(piece.input_ids) for piece in pieces)
    remarks: list[str] = []
    if not pieces:
        remarks.append(f"dropped, since its {length:,} tokens are more than data.max_length")
    elif left < length:
        remarks.append(f"{length - left:,} tokens cut off")
    elif len(pieces) > 1:
        remarks.append(f"split into {len(pieces)} pieces")
    if pieces and not any(map(usable, pieces)):
        remarks.append("fully masked, left out")
    return remarks


# -- the terminal -------------------------------------------------------------------------------------------------------------------


OPEN, CLOSE = "⟦", "⟧"  # around trained tokens where there is no colour


def legend(*, colour: bool) -> Text:
    """What the marks of a row's text mean."""
    if colour:
        return Text.assemble(
            "trained tokens are ", ("green", "green"), ", context is ", ("dim", "dim"), ", special tokens are ", ("bold", "bold")
        )
    return Text(f"trained tokens stand between {OPEN} and {CLOSE}, all others are context")


def coloured(shown: Shown) -> Text:
    """The row's text: trained tokens green, masked ones dim, special tokens bold, white space visible."""
    text = Text()
    marks = list(zip(visible(shown.tokens), shown.trained, shown.special, strict=True))
    for name, part in shown.cut(marks):
        _headed(text, name)
        for token, trained, special in part:
            style = "green" if trained else "dim"
            text.append(token, f"bold {style}" if special else style)
    return text


def bracketed(shown: Shown) -> Text:
    """The same without colour, for files and pipes: each run of trained tokens stands in brackets."""
    text = Text()
    for name, part in shown.cut(list(zip(visible(shown.tokens), shown.trained, strict=True))):
        _headed(text, name)
        for trained, run in groupby(part, key=lambda pair: bool(pair[1])):
            tokens = "".join(token for token, _ in run)
            text.append(f"{OPEN}{tokens}{CLOSE}" if trained else tokens)
    return text


def _headed(text: Text, name: str) -> None:
    """A line with the name of the segment that follows."""
    if name:
        text.append(f"{'' if not text or text.plain.endswith(chr(10)) else chr(10)}[{name}]\n", "bold cyan")


def view(account: Account | None, rows: Sequence[Shown], *, colour: bool = True) -> RenderableType:
    """Account (or none), histogram and rows for the console, and what the marks in the rows mean."""
    parts: list[RenderableType] = [] if account is None else [account.table(), Text(), histogram(account.lengths), Text()]
    if rows:
        parts.append(legend(colour=colour))
    for place, shown in enumerate(rows):
        parts += [*([Text()] if place or account else []), heading(shown), coloured(shown) if colour else bracketed(shown)]
    return Group(*parts)


def heading(shown: Shown) -> Text:
    """A line above a row."""
    return Text(plain(shown.title), style="bold")


def histogram(lengths: Lengths) -> RenderableType:
    """Bars of the examples' lengths."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("length in tokens", justify="right")
    table.add_column("examples", justify="right")
    table.add_column(f"mean {lengths.mean:g}, median {lengths.median:g}, 95 % up to {lengths.p95:g}", style="cyan")
    for start, end, count in _from_shortest(lengths):
        table.add_row(_span(start, end), f"{count:,}", _bar(count, lengths))
    return table


def _from_shortest(lengths: Lengths) -> list[tuple[int, int, int]]:
    """The histogram without the empty bars before the first example."""
    return [bar for bar in lengths.histogram if bar[1] >= lengths.min]


def _span(start: int, end: int) -> str:
    return f"{start:,}" if start == end else f"{start:,} to {end:,}"


def _bar(count: int, lengths: Lengths) -> str:
    most = max(count for _, _, count in lengths.histogram)
    eighths = round(count / most * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


# -- the page -----------------------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f24;background:#fff}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.1rem .8rem .1rem 0;text-align:left}}td.n{{text-align:right}}
td.bar{{width:24rem}}td.bar i{{display:block;height:.8rem;background:#2da44e}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.6 ui-monospace,monospace;background:#f6f8fa;padding:1rem;border-radius:6px}}
h2{{font-size:1rem;margin-top:2rem;overflow-wrap:anywhere}}h3{{font-size:.9rem;margin:1rem 0 0;color:#6e7781}}
.t{{color:#116329;background:#dafbe1}}.m{{color:#6e7781}}.s{{font-weight:bold}}
@media(prefers-color-scheme:dark){{body{{background:#0d1117;color:#e6edf3}}pre{{background:#161b22}}.t{{color:#7ee787;background:#12261e}}
.m{{color:#8b949e}}}}
</style></head><body><h1>{title}</h1>
<p>Tokens on <span class="t">green</span> are trained, <span class="m">grey</span> ones are context only, <b>bold</b> ones are special.</p>
{body}
</body></html>
"""


def page(title: str, account: Account | None, rows: Iterable[Shown]) -> str:
    """The same view as one HTML document that loads nothing and runs nothing. Tokens show their number and id under the pointer."""
    parts = [] if account is None else [_account_part(account), _histogram_part(account.lengths)]
    parts += [f"<h2>{html.escape(plain(shown.title))}</h2>\n{_row_part(shown)}" for shown in rows]
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _row_part(shown: Shown) -> str:
    segments = shown.cut(list(_spans(shown)))
    return "\n".join(f"{f'<h3>{html.escape(name)}</h3>' if name else ''}<pre>{''.join(spans)}</pre>" for name, spans in segments)


def _spans(shown: Shown) -> Iterator[str]:
    for place, text in enumerate(visible(shown.tokens)):
        kind = ("t" if shown.trained[place] else "m") + (" s" if shown.special[place] else "")
        yield f'<span class="{kind}" title="token {place + 1}, id {shown.ids[place]}">{html.escape(text)}</span>'


def _account_part(account: Account) -> str:
    lines = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{html.escape(count)}</td><td class="m">{html.escape(remark)}</td></tr>'
        for name, count, remark in account.lines()
    )
    malformed = "".join(f"<li>{html.escape(plain(f'{place.file}, row {place.row}: {place.reason}'))}</li>" for place in account.malformed)
    return f"<table>{lines}</table>" + (f"<p>Malformed rows:</p><ul>{malformed}</ul>" if malformed else "")


def _histogram_part(lengths: Lengths) -> str:
    most = max((count for _, _, count in lengths.histogram), default=1)
    lines = "".join(
        f'<tr><td class="n">{_span(start, end)}</td><td class="n">{count:,}</td>'
        f'<td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td></tr>'
        for start, end, count in _from_shortest(lengths)
    )
    return f"<table><tr><th>length in tokens</th><th>examples</th><th></th></tr>{lines}</table>"


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
