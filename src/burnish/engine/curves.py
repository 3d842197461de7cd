"""The curves of a run as pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from burnish.engine.progress import short

__all__ = ["Curve", "curves_of", "smooth"]

Floats = npt.NDArray[np.float64]
Line = dict[str, Any]

_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_MOST_POINTS = 1500


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture: a figure, its file name and what it shows."""

    name: str
    title: str
    figure: Figure

    def png(self, path: Path) -> None:
        """Writes the picture as a PNG file."""
        self.figure.savefig(path, format="png", dpi=160)

    def svg(self) -> bytes:
        """The picture as an SVG document with its letters as outlines, so that it looks the same everywhere."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        return buffer.getvalue()


def curves_of(steps: Sequence[Line], evaluations: Sequence[Line], *, best_step: int | None = None) -> list[Curve]:
    """The pictures of a run: loss first and large, then what the objective tells, learning rate, gradient norm and speed.

    Args:
        steps: Lines of metrics.jsonl.
        evaluations: Lines of eval.jsonl.
        best_step: Step of the evaluation to point out.
    """
    if not steps:
        return []
    return [
        _loss(steps, evaluations, best_step),
        *(_group(steps, evaluations, *group) for group in _GROUPS if any(key in line for line in steps for key in group[2])),
        _small(steps, "learning_rate", "Learning rate", "#0d9488"),
        _small(steps, "grad_norm", "Gradient norm", "#7c3aed", smoothed=True),
        _small(steps, "tokens_per_second", "Tokens per second", "#d97706", smoothed=True),
    ]


def smooth(values: Floats, *, width: float | None = None) -> Floats:
    """A centred average with Gaussian weights, which does not lag behind as a running one does; gaps (NaN) are passed over.

    Args:
        values: [N] in order.
        width: Standard deviation of the weights in steps; a fiftieth of N where left out.
    """
    width = width or max(1.0, len(values) / 50)
    reach = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    known = np.isfinite(values).astype(np.float64)
    # "full" and cut by hand: "same" would return the kernel's length where that is the longer one.
    cut = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total, weight = (np.convolve(part, kernel)[cut] for part in (np.where(known, values, 0.0), known))
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _loss(steps: Sequence[Line], evaluations: Sequence[Line], best_step: int | None) -> Curve:
    figure, axes = _axes(9.6, 3.9)
    at, values = _points(steps, "loss")
    _draw(axes, at, values, "#2563eb", label="training", smoothed=True)
    eval_at, eval_values = _points(evaluations, "eval_loss")
    if len(eval_at):
        axes.plot(eval_at, eval_values, color="#ea580c", linewidth=1.4, marker="o", markersize=4.5, label="held out", zorder=4)
    best = [(x, y) for x, y in zip(eval_at.tolist(), eval_values.tolist(), strict=True) if x == best_step]
    for x, y in best:
        axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor="#ea580c", zorder=5)
        # Towards the middle, so that the words never leave the picture.
        right = x > (at[0] + at[-1]) / 2
        axes.annotate(
            f"best {y:.4g}",
            (x, y),
            xytext=(-10 if right else 10, 12),
            textcoords="offset points",
            ha="right" if right else "left",
            color="#c2410c",
            fontsize=9,
            fontweight="bold",
        )
    _limit_to_the_bulk(axes, values, eval_values)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    return Curve("loss", "Loss", figure)


_GROUPS: list[tuple[str, str, dict[str, tuple[str, str]]]] = [
    ("rewards", "Rewards", {"reward_chosen": ("chosen", "#2563eb"), "reward_rejected": ("rejected", "#b91c1c")}),
    ("reward_margin", "Reward margin", {"reward_margin": ("", "#0d9488")}),
    (
        "reward_accuracy",
        "Preference accuracy",
        {
            "reward_accuracy": ("all", "#2563eb"),
            "accuracy_longer": ("chosen longer", "#a8a29e"),
            "accuracy_shorter": ("chosen shorter", "#db2777"),
        },
    ),
    ("answer_logp", "Log-probability", {"logp_chosen": ("chosen", "#2563eb"), "logp_rejected": ("rejected", "#b91c1c")}),
    ("kl", "Distance from the reference", {"kl": ("", "#7c3aed")}),
    ("divergence", "Distance from the teacher", {"divergence": ("", "#7c3aed")}),
]
"""Metrics of objectives that are drawn: file name, title, and label and colour of each line."""


def _group(steps: Sequence[Line], evaluations: Sequence[Line], name: str, title: str, lines: dict[str, tuple[str, str]]) -> Curve:
    """Several metrics in one picture, with what the held-out data says as dots."""
    figure, axes = _axes(3.5, 2.3)
    for key, (label, colour) in lines.items():
        at, values = _points(steps, key)
        if np.isfinite(values).any():
            _draw(axes, at, values, colour, label=label, smoothed=True)
        eval_at, eval_values = _points(evaluations, f"eval_{key}")
        if np.isfinite(eval_values).any():
            axes.plot(eval_at, eval_values, "D", color=colour, markeredgecolor="white", markersize=5, zorder=4)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=7.5, labelcolor=_INK, loc="best")
    return Curve(name, title, figure)


def _small(steps: Sequence[Line], key: str, title: str, colour: str, *, smoothed: bool = False) -> Curve:
    figure, axes = _axes(3.5, 2.3)
    at, values = _points(steps, key)
    _draw(axes, at, values, colour, smoothed=smoothed)
    axes.set_ylim(bottom=0)
    return Curve(key, title, figure)


def _draw(axes: Axes, at: Floats, values: Floats, colour: str, *, label: str = "", smoothed: bool = False) -> None:
    # A handful of points is shown as it is: an average over them would only hide something.
    smoothed = smoothed and len(values) >= 20
    marker = "o" if len(values) < 20 else ""
    raw: dict[str, Any] = (
        {"alpha": 0.28, "linewidth": 1.0} if smoothed else {"label": label, "linewidth": 1.8, "marker": marker, "markersize": 4}
    )
    axes.plot(*_thinned(at, values), color=colour, **raw)
    if smoothed:
        axes.plot(*_thinned(at, smooth(values)), color=colour, linewidth=2.0, label=label, zorder=3)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=8.5, length=0)
    axes.set_xlabel("step", color=_MUTED, fontsize=8.5, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(3, int(width * 1.2))))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.margins(x=0.01)
    return figure, axes


def _tick(value: float) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e3:
        return f"{value:g}"
    if abs(value) >= 1e3:
        return short(value)
    digits, power = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _points(lines: Sequence[Line], key: str) -> tuple[Floats, Floats]:
    at = np.array([line["step"] for line in lines], dtype=np.float64)
    values = [line.get(key) for line in lines]
    return at, np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _thinned(at: Floats, values: Floats) -> tuple[Floats, Floats]:
    """At most so many points that a line still shows them all: neighbours become their mean."""
    size = -(-len(at) // _MOST_POINTS)
    if size <= 1:
        return at, values
    kept = len(at) // size * size
    return at[:kept].reshape(-1, size)[:, -1], values[:kept].reshape(-1, size).mean(axis=1)


def _limit_to_the_bulk(axes: Axes, *series: Floats) -> None:
    """Keeps a single spike from flattening everything else."""
    values = np.concatenate(series)
    values = values[np.isfinite(values)]
    if len(values) < 20:
        return
    low, high, most = values.min(), np.quantile(values, 0.99), values.max()
    if most - low > 1.5 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
