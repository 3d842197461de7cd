"""The settings of the built-in objectives.

They stand here, not beside the losses, so that `burnish check` and the JSON schema know them without importing torch. The loss of
`kind: foo` is in `objectives/foo.py`. An objective of your own (`kind: ./my_loss.py:MyLoss`) brings its own `Config`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Discriminator, Field, Tag

from burnish.config.base import Kind, LongForm, Strict


class SFT(Strict):
    """Supervised fine-tuning: cross-entropy on the trained tokens, averaged over tokens."""

    kind: Literal["sft"] = "sft"
    """The objective's name."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability spread evenly over the vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-sum-exp of the logits, which keeps them from drifting (PaLM used 1e-4)."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings while training (NEFTune, 2310.05914); 5 to 15 in the paper, 0 is off."""


class Plugin(Strict):
    """An objective from a local file (`./my_loss.py:MyLoss`) or an installed package; further keys are given to its own Config."""

    model_config = ConfigDict(extra="allow")
    kind: Annotated[str, Kind(lambda: tuple(BUILT_IN), "objectives", listed=False)]
    """`./file.py:ClassName`, a file that you name on purpose."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys meant for the plug-in's own Config."""
        return dict(self.model_extra or {})


BUILT_IN: dict[str, type[Strict]] = {"sft": SFT}


def tag_of(value: Any) -> str:
    """Which member of the union a value is meant for: the built-in of its kind, else a plug-in."""
    kind: Any = cast(dict[str, Any], value).get("kind", "sft") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in BUILT_IN else "plugin"


Objective = Annotated[
    Annotated[SFT, Tag("sft")] | Annotated[Plugin, Tag("plugin")],
    Discriminator(tag_of),
    LongForm("kind"),
]
