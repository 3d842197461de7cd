"""The page at the end of a run: what was trained on what, how it went, with which software.

Everything comes from files of the run folder, so a report can be made again at any time. The page stands alone: no script, nothing
fetched, every text escaped.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import torch

from burnish.core.log import counted
from burnish.engine.metrics import read_lines
from burnish.engine.progress import short

__all__ = ["write_report"]

Line = dict[str, Any]
_PACKAGES = ("burnish", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "bitsandbytes", "numpy")
_FATES = (  # how the parts of the account are named and coloured
    ("kept", "trained on", "#2563eb"),
    ("trained", "trained", "#2563eb"),
    ("masked", "context only", "#bfdbfe"),
    ("eval", "held out", "#ea580c"),
    ("duplicate", "duplicate", "#a8a29e"),
    ("empty", "empty", "#d6d3d1"),
    ("malformed", "malformed", "#b91c1c"),
    ("truncated", "cut off", "#b91c1c"),
    ("dropped", "too long, left out", "#db2777"),
    ("fully_masked", "nothing to train", "#7c3aed"),
)


@dataclass(frozen=True, slots=True)
class _Tile:
    label: str
    value: str
    note: str = ""


def write_report(folder: Path, *, stopped: bool = False) -> Path:
    """Writes report.html and curves/*.png from what the run folder holds, and returns the page's path.

    Reads metrics.jsonl, eval.jsonl, run.yaml and data.json; what is missing is left out of the page.

    Args:
        folder: The run folder.
        stopped: The run has been interrupted and may go on, which the page says.
    """
    from burnish.engine.curves import curves_of  # here: matplotlib is wanted at the end of a run only, not before its first step

    steps, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")
    account = _json(folder / "data.json")
    config = _text(folder / "run.yaml")
    best = _best(evaluations)
    pictures = curves_of(steps, evaluations, best_step=best["step"] if best else None)
    (folder / "curves").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        picture.png(folder / "curves" / f"{picture.name}.png")
    page = _template().render(
        name=folder.resolve().name,
        subtitle=_subtitle(steps, "stopped before its end" if stopped else "finished"),
        tiles=list(_tiles(steps, evaluations, best)),
        curves=[{"title": picture.title, "source": _data_url(picture.svg())} for picture in pictures],
        shares=list(_shares(account)),
        histogram=_histogram(account),
        remarks=list(_remarks(account)),
        evaluations=_evaluation_table(evaluations, best) if evaluations else [],
        config=config,
        environment=list(_environment()),
    )
    unfinished = folder / "report.html.unfinished"
    unfinished.write_text(page, encoding="utf-8")
    return unfinished.replace(folder / "report.html")


def _template() -> jinja2.Template:
    source = resources.files("burnish.engine").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(source)


def _subtitle(steps: Sequence[Line], how: str) -> str:
    date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return f"{counted(len(steps), 'step')}, {how} {date}" if steps else date


def _tiles(steps: Sequence[Line], evaluations: Sequence[Line], best: Line | None) -> Iterator[_Tile]:
    if not steps:
        yield _Tile("Steps", "0", "nothing was trained")
        return
    losses = [line["loss"] for line in steps if line["loss"] is not None]
    if losses:
        tail = losses[-max(1, len(losses) // 20) :]
        yield _Tile("Training loss", f"{sum(tail) / len(tail):.4g}", f"from {losses[0]:.4g}")
    if best:
        first = evaluations[0]["eval_loss"] if len(evaluations) > 1 else None
        note = f"from {first:.4g}, best at step {best['step']}" if first else f"at step {best['step']}"
        yield _Tile("Held-out loss", f"{best['eval_loss']:.4g}", note)
        if "eval_reward_accuracy" in best:
            before = evaluations[0].get("eval_reward_accuracy") if len(evaluations) > 1 else None
            note = f"held out, from {before:.1%}" if before is not None else "held out"
            yield _Tile("Preference accuracy", f"{best['eval_reward_accuracy']:.1%}", note)
        if "eval_perplexity" in best:
            yield _Tile("Perplexity", f"{best['eval_perplexity']:.4g}" if best["eval_perplexity"] else "-", "at the best step")
    tokens, trained = sum(line["tokens"] for line in steps), sum(line["trained_tokens"] for line in steps)
    seconds = sum(line["seconds"] for line in steps)
    yield _Tile("Tokens", short(tokens), f"{short(trained)} of them trained")
    yield _Tile("Time in steps", _clock(seconds), counted(len(steps), "step"))
    yield _Tile("Speed", f"{short(tokens / seconds)} tokens/s" if seconds else "-", "over all steps")


def _shares(account: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    if account is None:
        return
    for what, section, keys in (
        ("rows read", "rows", ("kept", "eval", "duplicate", "empty", "malformed", "dropped", "fully_masked")),
        ("tokens", "tokens", ("trained", "masked", "eval", "truncated", "dropped", "fully_masked", "duplicate")),
    ):
        counts = {key: int(account[section].get(key, 0)) for key in keys}
        total = sum(counts.values())
        parts = [
            {"name": name, "colour": colour, "count": f"{counts[key]:,}", "percent": round(100 * counts[key] / total, 3)}
            | {"share": f"{counts[key] / total:.1%}"}
            for key, name, colour in _FATES
            if counts.get(key)
        ]
        if total:
            yield {"what": what, "total": f"{total:,}", "parts": parts}


def _histogram(account: Mapping[str, Any] | None) -> dict[str, Any] | None:
    lengths = (account or {}).get("lengths") or {}
    bars = lengths.get("histogram") or []
    most = max((count for _, _, count in bars), default=0)
    if not most:
        return None
    return {
        "bars": [
            {"percent": round(100 * count / most, 2), "title": f"{start}-{end} tokens: {count:,} examples"} for start, end, count in bars
        ],
        "first": f"{bars[0][0]} tokens",
        "middle": f"length of the examples: median {lengths['median']:g}, 95 % under {lengths['p95']:g}, longest {lengths['max']:,}",
        "last": f"{bars[-1][1]:,}",
    }


def _remarks(account: Mapping[str, Any] | None) -> Iterator[str]:
    if account is None:
        return
    overlong, truncated = account["rows"].get("overlong", 0), account["tokens"].get("truncated", 0)
    if overlong:
        rows = f"{counted(overlong, 'row')} {'is' if overlong == 1 else 'are'}"
        yield f"{rows} longer than data.max_length; {truncated:,} tokens were cut off."
    for place in account.get("malformed", [])[:5]:
        yield f"malformed: {place['file']}, row {place['row']}: {place['reason']}"
    if account.get("eval_rows_also_in_train"):
        yield f"{account['eval_rows_also_in_train']:,} held-out rows are also trained on, so the held-out loss flatters."


def _evaluation_table(evaluations: Sequence[Line], best: Line | None) -> list[list[str]]:
    """Headings and rows; a column for each number that the evaluations have."""
    columns = {key: name for key, name in _EVALUATED.items() if any(key in line for line in evaluations)}

    def shown(line: Line, key: str) -> str:
        value = line.get(key)
        text = "-" if value is None else f"{value:.4f}"
        return f"{text} (best)" if key == "eval_loss" and line is best else text

    return [["step", *columns.values()], *([str(line["step"]), *(shown(line, key) for key in columns)] for line in evaluations)]


_EVALUATED = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_reward_accuracy": "preference accuracy",
    "eval_reward_margin": "reward margin",
    "eval_kl": "distance from the reference",
    "eval_divergence": "distance from the teacher",
}
"""Columns of the table of evaluations."""


def _best(evaluations: Sequence[Line]) -> Line | None:
    finite = [line for line in evaluations if line["eval_loss"] is not None]
    return min(finite, key=lambda line: line["eval_loss"], default=None)


def _environment() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    yield "python", platform.python_version()
    yield "system", platform.platform()
    yield "processor", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    for device in range(torch.cuda.device_count()):
        yield f"gpu {device}", torch.cuda.get_device_name(device)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes}:{rest:02} min" if minutes else f"{seconds:.1f} s"


def _data_url(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
