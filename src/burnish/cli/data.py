"""`burnish data RUN.yaml`: what is trained on, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import typer
from rich.console import Console

from burnish.config.load import load_run
from burnish.config.objectives import batch_kind
from burnish.config.run import RunConfig
from burnish.core.errors import BurnishError
from burnish.core.log import info
from burnish.data import inspect
from burnish.data.account import Account, Lengths
from burnish.data.inspect import Shown, Tokenizer
from burnish.data.pipeline import Renderer as RendererLike
from burnish.data.pipeline import chunks
from burnish.data.prepare import open_set, pipeline_of, prepare
from burnish.data.render import Renderer
from burnish.data.tally import Tally
from burnish.models.tokenizer import load_tokenizer

ON_SCREEN, IN_PAGE = 3, 25  # rows shown
GLANCE = 1000  # rows read of a stream, which may have no end


def main(file: Path, overrides: Sequence[str], *, row: str | None, html: Path | None, as_json: bool) -> None:
    """Shows the account of a run's data, or one row of it.

    Raises:
        BurnishError: the run file or the data is wrong, or the page cannot be written.
    """
    named, number = (None, 0) if row is None else _place(row)
    loaded = load_run(file, overrides)
    config = loaded.config
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer.of(tokenizer, config.data)
    base = file.resolve().parent
    account: Account | None = None
    if row is not None:
        kind = batch_kind(config.objective, base)
        place = {"kind": kind, "file": named, "seed": config.train.seed, "base": base}
        rows = [inspect.row_number(config.data, renderer, tokenizer, number, **place)]
        document = rows[0].to_json()
    else:
        account, rows = _overview(config, renderer, tokenizer, count=IN_PAGE if html else ON_SCREEN, base=base)
        document = account.to_json()
    if html is not None:
        _write(html, inspect.page(f"burnish data {file.name}", account, rows))
    if as_json:
        typer.echo(json.dumps(document))
    else:
        _print(account, rows[:ON_SCREEN])


def _overview(config: RunConfig, renderer: RendererLike, tokenizer: Tokenizer, *, count: int, base: Path) -> tuple[Account, list[Shown]]:
    """The account, and the first examples."""
    if config.data.streaming:
        return _glance(config, renderer, tokenizer, count=count, base=base)
    prepared = prepare(config.data, renderer, seed=config.train.seed, kind=batch_kind(config.objective, base), base=base)
    train = prepared.train
    return prepared.account, [inspect.show([train[i]], tokenizer, train.origin(i)) for i in range(min(count, len(train)))]


def _glance(config: RunConfig, renderer: RendererLike, tokenizer: Tokenizer, *, count: int, base: Path) -> tuple[Account, list[Shown]]:
    """The same for the first rows of a stream."""
    data, seed = config.data, config.train.seed
    opened = open_set(data.train, batch_kind(config.objective, base), seed=seed, streaming=True, base=base)
    tally = Tally(opened.account(), deduplicate=data.deduplicate)
    shown: list[Shown] = []
    lengths: list[int] = []
    pipeline = pipeline_of(data, opened, renderer)
    for tasks in chunks(islice(opened.tasks(data, seed), GLANCE)):
        block = tally.enter(tasks, pipeline.run(tasks)).block
        lengths += block.lengths.tolist()
        for place, example in zip(block.rows.tolist(), block.examples(), strict=True):
            if len(shown) < count:
                source_row = tasks[place].row
                shown.append(inspect.show([example], tokenizer, (source_row.file, source_row.number)))
    tally.account.lengths = Lengths.of(lengths)
    info(f"data.train is streamed: this is the account of its first {tally.account.rows.read:,} rows")
    return tally.account, shown


def _print(account: Account | None, rows: Sequence[Shown]) -> None:
    screen = Console(highlight=False)
    colour = screen.color_system is not None and not screen.no_color
    screen.print(inspect.view(account, rows, colour=colour), soft_wrap=account is None)


def _place(text: str) -> tuple[str | None, int]:
    """File and number out of `--row`.

    Raises:
        BurnishError: it is neither `N` nor `FILE:N`.
    """
    file, _, number = text.rpartition(":")
    if not number.isdecimal() or int(number) < 1:
        raise BurnishError(f"--row takes the number of a row, from 1, or FILE:NUMBER, found '{text}'")
    return file or None, int(number)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise BurnishError(f"the page cannot be written to {file}: {error.strerror or error}") from error
    info(f"written to {file}")
