"""The settings of the built-in objectives.

They stand here, not beside the losses, so that `burnish check` and the JSON schema know them without importing torch. The loss of
`kind: foo` is in `objectives/foo.py`. An objective of your own (`kind: ./my_loss.py:MyLoss`) brings its own `Config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag

from burnish.config.base import Duration, Kind, Location, LongForm, OneOrMany, Strict
from burnish.core import plugins
from burnish.core.errors import ConfigError, Where, did_you_mean

BatchKind = Literal["tokens", "pairs", "judged", "steps"]
ReferenceKind = Literal["auto", "adapter_off", "precomputed", "copy"]


class Objective(Strict):
    """What every objective says about itself."""

    batch: ClassVar[BatchKind] = "tokens"
    """What it compares, see `data.types.BatchKind`."""
    learning_rate: ClassVar[float] = 2e-4
    """The default of `train.learning_rate`."""

    judges: ClassVar[Literal["answers", "steps"] | None] = None
    """What a score head judges, where there is one."""

    @property
    def mismatched(self) -> bool:
        """Whether it wants every answer once more, under another prompt of the step."""
        return False


class SFT(Objective):
    """Supervised fine-tuning: cross-entropy on the trained tokens, averaged over tokens."""

    kind: Literal["sft"] = "sft"
    """The objective's name."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability spread evenly over the vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-sum-exp of the logits, which keeps them from drifting (PaLM used 1e-4)."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings while training (NEFTune, 2310.05914); 5 to 15 in the paper, 0 is off."""


class Sync(Strict):
    """TR-DPO (2404.09656): the reference follows the policy, `reference = mix policy + (1 - mix) reference`, every so often."""

    every: Duration = Duration(512, "st")
    """`512st`, `0.1ep` ..."""
    mix: float = Field(default=0.6, gt=0, le=1)
    """Share of the policy; 1 is the hard update."""


DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]


class DPO(Objective):
    """Direct preference optimisation (2305.18290) and its relatives: make the chosen answer likelier than the rejected one."""

    batch: ClassVar[BatchKind] = "pairs"
    learning_rate: ClassVar[float] = 5e-6
    kind: Literal["dpo"] = "dpo"
    """The objective's name."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference: more is closer (tau for `ipo`)."""
    loss: Annotated[list[DPOLoss], Field(min_length=1), OneOrMany()] = Field(default=["sigmoid"])
    """A variant, or several whose losses are added. What each is, with its paper: docs/preference.md."""
    loss_weights: list[Annotated[float, Field(ge=0)]] | None = None
    """The weight of each loss, where there are several; 1 each where left out."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round: `sigmoid` (cDPO), `robust`, `exo_pair` (which needs it), `aot`."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the policy to the reference (f-DPO, 2309.16240)."""
    alpha: float = Field(default=0.5, ge=0)
    """Of the alpha divergence."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Temperature of the blend in `discopop`."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Length-desensitised (2409.06411): weight of the part of the longer answer that goes beyond the shorter one. Off where left out."""
    wpo: bool = False
    """Weigh pairs by how likely the policy makes them (WPO, 2406.11827)."""
    reference: ReferenceKind = "auto"
    """Where the reference's log-probabilities come from. `auto`: the cheapest that is exact, and the run says which."""
    sync: Sync | None = None
    """Let the reference follow the policy (TR-DPO). Left out: it stays."""


class SimPO(Objective):
    """SimPO (2405.14734): the mean log-probability is the reward, with a margin and without a reference; with `alpha`, AlphaPO."""

    batch: ClassVar[BatchKind] = "pairs"
    learning_rate: ClassVar[float] = 5e-6
    kind: Literal["simpo"] = "simpo"
    """The objective's name."""
    beta: float = Field(default=2.0, gt=0)
    """Scale of the reward; 2 to 2.5 in the paper."""
    gamma: float = Field(default=1.0, ge=0)
    """The margin by which the chosen reward shall be larger; 0.3 to 0.5 of beta in the paper."""
    alpha: float = 0.0
    """Shape of the reward (AlphaPO, 2501.03884): (1 - p^-alpha) / alpha in place of log p; 0 is SimPO."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy on the chosen answers (CPO-SimPO)."""


class CPO(Objective):
    """Contrastive preference optimisation (2401.08417): DPO with a uniform reference, and cross-entropy on the chosen answers."""

    batch: ClassVar[BatchKind] = "pairs"
    learning_rate: ClassVar[float] = 5e-6
    kind: Literal["cpo"] = "cpo"
    """The objective's name."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference of log-probabilities (tau for `ipo`)."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """How the difference is judged."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round (`sigmoid`)."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy on the chosen answers."""


class ORPO(Objective):
    """ORPO (2403.07691): cross-entropy on the chosen answers plus the odds ratio of the two. No reference."""

    batch: ClassVar[BatchKind] = "pairs"
    learning_rate: ClassVar[float] = 1e-5
    kind: Literal["orpo"] = "orpo"
    """The objective's name."""
    beta: float = Field(default=0.1, ge=0)
    """Weight of the odds ratio (lambda in the paper)."""


class KTO(Objective):
    """KTO (2402.01306): learn from answers that are judged good or bad, each by itself; pairs are taken apart."""

    batch: ClassVar[BatchKind] = "judged"
    learning_rate: ClassVar[float] = 5e-6
    kind: Literal["kto"] = "kto"
    """The objective's name."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference: more is closer."""
    loss: Literal["kto", "apo_zero"] = "kto"
    """`apo_zero` (2408.06266) does without the estimate of the KL divergence."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers. Good and bad should weigh about the same: desirable_weight x good to undesirable_weight x bad, 1:1 to 4:3."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers."""
    reference: ReferenceKind = "auto"
    """Where the reference's log-probabilities come from. `auto`: the cheapest that is exact, and the run says which.
    `precomputed` is for apo_zero alone: kto asks about answers under other prompts, which are new in every step."""

    @property
    def mismatched(self) -> bool:
        """Whether it wants every answer once more, under another prompt of the step."""
        return self.loss == "kto"


class Reward(Objective):
    """A reward model: a score for each answer, so that the chosen one has the higher (Bradley-Terry, 2203.02155 equation 1)."""

    batch: ClassVar[BatchKind] = "pairs"
    learning_rate: ClassVar[float] = 1e-4
    judges: ClassVar[Literal["answers", "steps"] | None] = "answers"
    kind: Literal["reward"] = "reward"
    """The objective's name."""
    centering: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps scores around zero (2312.09244); 0.01 is usual."""
    margin: bool = True
    """Ask for a difference of the row's `margin` where it has one (Llama 2, 2307.09288)."""


class ProcessReward(Objective):
    """A process reward model: whether each step of a solution is right (2305.20050), judged at the step's last token."""

    batch: ClassVar[BatchKind] = "steps"
    learning_rate: ClassVar[float] = 1e-4
    judges: ClassVar[Literal["answers", "steps"] | None] = "steps"
    kind: Literal["process_reward"] = "process_reward"
    """The objective's name."""


class Distill(Objective):
    """Learn from a teacher's whole distribution at every trained token (2306.13649). The teacher has the same vocabulary."""

    kind: Literal["distill"] = "distill"
    """The objective's name."""
    teacher: Annotated[str, Location("model")] = Field(min_length=1)
    """The teacher: hub id, folder or `file.gguf`."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """`forward_kl` covers all that the teacher does, `reverse_kl` seeks what it does most, `js` is between."""
    mix: float = Field(default=0.5, gt=0, lt=1)
    """Of `js`: the share of the teacher in the mixture that both are compared with; near 0 it is like `forward_kl`, near 1 `reverse_kl`."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits."""
    sft_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the plain cross-entropy; the rest is the teacher's."""


class Plugin(Strict):
    """An objective from a local file (`./my_loss.py:MyLoss`) or an installed package; further keys are given to its own Config."""

    model_config = ConfigDict(extra="allow")
    kind: Annotated[str, Kind(lambda: tuple(BUILT_IN), "objectives", listed=False)]
    """`./file.py:ClassName`, a file that you name on purpose."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys meant for the plug-in's own Config."""
        return dict(self.model_extra or {})


BUILT_IN: dict[str, type[Objective]] = {
    "sft": SFT,
    "dpo": DPO,
    "simpo": SimPO,
    "cpo": CPO,
    "orpo": ORPO,
    "kto": KTO,
    "reward": Reward,
    "process_reward": ProcessReward,
    "distill": Distill,
}


def tag_of(value: Any) -> str:
    """Which member of the union a value is meant for: the built-in of its kind, else a plug-in."""
    kind: Any = cast(dict[str, Any], value).get("kind", "sft") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in BUILT_IN else "plugin"


AnyObjective = Annotated[
    Annotated[SFT, Tag("sft")]
    | Annotated[DPO, Tag("dpo")]
    | Annotated[SimPO, Tag("simpo")]
    | Annotated[CPO, Tag("cpo")]
    | Annotated[ORPO, Tag("orpo")]
    | Annotated[KTO, Tag("kto")]
    | Annotated[Reward, Tag("reward")]
    | Annotated[ProcessReward, Tag("process_reward")]
    | Annotated[Distill, Tag("distill")]
    | Annotated[Plugin, Tag("plugin")],
    Discriminator(tag_of),
    LongForm("kind"),
]
"""What is minimised, and so which rows a run can use."""


def batch_kind(objective: Objective | Plugin, base: Path) -> BatchKind:
    """What the run's objective compares, and so which rows it can use.

    An objective of the user's own says so with an attribute `batch_kind`; without one it gets what SFT gets.

    Raises:
        ConfigError: there is no such objective, or what it says is none of the kinds.
    """
    if isinstance(objective, Objective):
        return objective.batch
    kind: Any = getattr(plugins.load("objectives", objective.kind, base), "batch_kind", "tokens")
    if kind not in (kinds := get_args(BatchKind)):
        raise ConfigError(f"batch_kind is {kind!r}; {did_you_mean(str(kind), kinds)}", where=Where(field=f"objective {objective.kind}"))
    return cast(BatchKind, kind)
