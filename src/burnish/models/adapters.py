"""Low-rank adapters: the only door to PEFT.

    attach     a fresh adapter on a model, or the one that `adapter.path` names
    save       a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) that plain PEFT loads to the same logits
    load       a PEFT folder onto a model
    merge      the model with the adapter's update added to its weights
    projection a linear layer with its adapter, as kernels take it
    experts_of the experts of a mixture with theirs, as kernels take them
    disabled   a context in which the model answers as its base

Adapter weights are float32, whatever the base is stored in: updates of one learning rate vanish in bfloat16.
"""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import TypeIs

from burnish.config.sections import Adapter
from burnish.core.errors import AdapterError, Where
from burnish.kernels.experts import ExpertLora
from burnish.kernels.lora import LoraWeights, Projection
from burnish.models import score
from burnish.models.hidden import hidden
from burnish.models.locate import reading
from burnish.models.quantized import is_nf4, weight_of
from burnish.models.targets import Targets, find_targets, find_whole_modules

# PEFT imports bitsandbytes just to see whether a layer is one of its kinds, which costs the first step a second. It sees it again below,
# in `_wrap`, where weights are quantised.
with hidden("bitsandbytes"):
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, import_utils, set_peft_model_state_dict
    from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
_SWITCH = "_disable_adapters"  # of PEFT's layers, which has no public way that leaves requires_grad alone
_SCORE = f"base_model.model.{score.NAME}."
_CLASSIFIERS = (score.NAME, "classifier")
"""Modules that PEFT trains in classification models, whether they are there or not."""
_INITS: dict[str, Any] = {"default": True}
_MOVES_BASE = ("pissa", "olora")  # these start from a part of the base weight, and take that part out of it
_QUANTIZED = (torch.uint8, torch.int8)


def attach(model: PreTrainedModel, adapter: Adapter, *, new_token_ids: Sequence[int] = (), revision: str | None = None) -> PeftModel:
    """Puts a trainable adapter on `model` (in place) and freezes the rest.

    Args:
        model: The base model. Its `name_or_path` is written into the adapter as where the base is.
        adapter: What kind of adapter, and where it goes.
        new_token_ids: Tokens whose embeddings (and output rows) are trained too.
        revision: The base's revision on the hub, for the record.

    Raises:
        AdapterError: when the adapter does not fit the model.
    """
    if adapter.path is not None:
        return load(model, adapter.path, trainable=True)
    targets = find_targets(model, adapter.targets)
    _check(model, adapter, targets)
    whole = find_whole_modules(model, adapter.save_modules)
    config = LoraConfig(
        task_type=_task(model),
        r=adapter.rank,
        lora_alpha=_number(adapter.alpha),
        lora_dropout=adapter.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        fan_in_fan_out=targets.transposed,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=_INITS.get(adapter.init, adapter.init),
        modules_to_save=whole or None,
        trainable_token_indices=_token_rows(model, new_token_ids, whole) or None,
        ensure_weight_tying=_tied(model) and any(name in whole for name in _embedding_names(model)),
    )
    return _wrap(model, config, revision=revision)


def load(model: PreTrainedModel, path: str | Path, *, trainable: bool = False) -> PeftModel:
    """Puts the adapter of a PEFT folder (or hub id) on `model` (in place).

    Raises:
        AdapterError: when there is none, when it is not LoRA, when its weights are a pickle file, or when it does not fit the model.
    """
    folder = find_adapter(str(path))
    config = read_config(folder)
    config.inference_mode = not trainable
    config.base_model_name_or_path = None  # PEFT writes where the base is here and now
    with _fitting(folder):
        state = load_file(folder / WEIGHTS_FILE)
    scores = {name: state.pop(name) for name in list(state) if name.startswith(_SCORE)}
    if scores:  # of a reward model; its head is put on by itself, so that the model may be the causal LM that it was made from
        score.drop_output_head(model)
        config.task_type = _task(model)
        config.modules_to_save = [name for name in config.modules_to_save or () if name not in _CLASSIFIERS] or None
    wrapped = _wrap(model, config)
    if scores:
        with _fitting(folder):
            score.put_score(model, {name.removeprefix(_SCORE): value for name, value in scores.items()}, trainable=trainable)
    with _fitting(folder):
        result = set_peft_model_state_dict(wrapped, state)
    missing = [name for name in result.missing_keys if f".{_NAME}" in name and ("lora_" in name or "modules_to_save" in name)]
    if missing or result.unexpected_keys:
        names = ", ".join(sorted([*missing, *result.unexpected_keys])[:5])
        raise AdapterError(f"the adapter's weights do not fit the model: {names}", where=Where(file=str(folder)))
    return wrapped


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter into `folder` as plain PEFT reads it.

    PiSSA and OLoRA adapters are written as ordinary LoRA of twice the rank, the trained part minus the part they began with, so that they
    belong to the untouched base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = copy.copy(model.peft_config[_NAME])
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if _moved_layers(model):
        state, config = _without_start(model, state, config)
    if judges := score.judged_by(model):
        head: Any = score.score_of(model)
        state |= {f"{_SCORE}{name}": value for name, value in head.state_dict().items()}
        config.task_type = score.TASKS[judges]
        config.modules_to_save = [*(config.modules_to_save or ()), score.NAME]
        config.ensure_weight_tying = False  # there is no output head that could be tied
        if rows := config.trainable_token_indices:
            inputs = _embedding_names(model.get_base_model())  # pyright: ignore[reportArgumentType]
            config.trainable_token_indices = {name: ids for name, ids in rows.items() if name in inputs}
    config.inference_mode = True
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"}
    )
    config.save_pretrained(str(folder))


def merge(model: PeftModel) -> PreTrainedModel:
    """The model with the adapter's update added to its weights (in place), an ordinary model again.

    Raises:
        AdapterError: when the base is quantised (merging would round the update away), or the adapter holds values that are not finite.
    """
    if any(parameter.dtype in _QUANTIZED for parameter in model.parameters()):
        raise AdapterError("an adapter cannot be merged into quantised weights", hint="Load the base model without model.quantize first.")
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"the adapter cannot be merged: {error}") from error
    merged.requires_grad_(True)
    return merged


@contextmanager
def disabled(model: PeftModel) -> Generator[None]:
    """Inside, the model computes exactly what its base model computes.

    PEFT's own context also says of the weights that they are not trained, and afterwards that they are: of those that are in their places
    then, which need not be the same ones where weights lie in shards.
    """
    moved: list[Any] = _moved_layers(model)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and module not in moved:
                stack.callback(setattr, module, _SWITCH, getattr(module, _SWITCH))
                setattr(module, _SWITCH, True)
        for layer in moved:
            stack.enter_context(_at_start(layer))
        yield


def output_weight(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The output head's weight [V, H] as training uses it: with a module saved whole, or with the rows of new tokens put in place."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head: Any = inner.get_output_embeddings()
    if not isinstance(head, AuxiliaryTrainingWrapper):
        return head.weight
    if head.disable_adapters:
        return head.original_module.weight
    adapter: Any = getattr(head, "token_adapter", None)
    weight: Any = adapter.get_merged_weights(adapter.active_adapters) if adapter is not None else head.weight
    return weight


def is_adapted(model: object) -> TypeIs[PeftModel]:
    """Whether `model` carries an adapter of this module's."""
    return isinstance(model, PeftModel)


def is_lora_layer(module: object) -> bool:
    """Whether `module` is a linear layer with an adapter on it, its weight in NF4 or not quantised by others."""
    return isinstance(module, Linear) or (isinstance(module, LoraLayer) and is_nf4(module.get_base_layer()))


def projection(layer: Any) -> Projection | None:
    """A linear layer as kernels take it, with the adapter that is at work on it at this moment.

    None for everything that they do not compute as the layer itself does: hooks, several adapters at once, merged adapters, other kinds
    of layers and of adapters.
    """
    if not is_lora_layer(layer):
        return _plain(layer)
    base = _plain(layer.get_base_layer())
    if base is None or layer.merged or is_hooked(layer):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not active:
        return base
    (name, *more) = active
    variant = type(layer.lora_variant[name]) if name in layer.lora_variant else None
    if more or layer.fan_in_fan_out or layer.lora_bias.get(name) or variant not in (None, DoraLinearVariant):
        return None
    a: Any = layer.lora_A[name]
    b: Any = layer.lora_B[name]
    dropout = layer.lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    magnitude: Any = layer.lora_magnitude_vector[name].weight if variant is DoraLinearVariant else None
    return Projection(base.weight, base.bias, LoraWeights(a.weight, b.weight, layer.scaling[name], share, magnitude))


def _plain(layer: Any) -> Projection | None:
    """A linear layer that is its weight, however stored, and its bias and nothing else."""
    weight = None if "forward" in vars(layer) else weight_of(layer)
    return Projection(weight, layer.bias) if weight is not None and not is_hooked(layer) else None


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The feed-forwards of a mixture of experts.

    Attributes:
        gate_up: [E, 2 I, H], gate above up.
        down: [E, H, I].
        activation: The module between them.
        lora_gate_up: The adapters on `gate_up`.
        lora_down: The adapters on `down`.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: nn.Module
    lora_gate_up: ExpertLora | None
    lora_down: ExpertLora | None


def experts_of(module: Any) -> Experts | None:
    """A module of experts as kernels take it, with the adapters that are at work on it at this moment.

    PEFT wraps such a module once for each adapted weight, one wrapper in the other; `module` is the outermost.

    None for everything that is not computed as the module itself does: another layout, hooks inside, several adapters at once, merged
    adapters, other kinds of adapters.
    """
    loras: dict[str, ExpertLora | None] = {}
    inner: Any = module
    while isinstance(inner, ParamWrapper):
        name, layer, inner = inner.parameter_name, inner, inner.base_layer
        active = [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if layer.merged or len(active) > 1 or name not in _EXPERT_WEIGHTS or name in loras or is_hooked(inner):
            return None
        loras[name] = _expert_lora(layer, active[0]) if active else None
        if active and loras[name] is None:
            return None
    if not _plain_experts(inner):
        return None
    gate_up, down = (getattr(inner, name) for name in _EXPERT_WEIGHTS)
    return Experts(gate_up, down, inner.act_fn, *(loras.get(name) for name in _EXPERT_WEIGHTS))


_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
_EXPERT_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "is_transposed": False,
    "_is_expert_parallel": False,
}
"""How transformers describes experts that are two products with a gated unit between them."""


def _plain_experts(module: Any) -> bool:
    if any(getattr(module, name, None) is not value for name, value in _EXPERT_LAYOUT.items()) or not hasattr(module, "act_fn"):
        return False
    if getattr(type(module)._apply_gate, "__name__", "") != "_default_apply_gate":  # others clamp, scale or interleave
        return False
    weights: list[Any] = [getattr(module, name, None) for name in _EXPERT_WEIGHTS]
    return all(type(w) in (torch.Tensor, nn.Parameter) and w.dtype in _EXPERT_TYPES for w in weights)


_EXPERT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _expert_lora(layer: Any, name: str) -> ExpertLora | None:
    """PEFT keeps the adapters of all experts in two matrices: A [E r, in], expert by expert, and B [out, r E], rank by rank."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropped = not isinstance(layer.lora_dropout[name], nn.Identity)
    if dropped or name in layer.lora_variant or layer.lora_bias.get(name) or not layer._did_swap_in_out_features:
        return None
    each = a.view(layer.num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    return ExpertLora(*each, layer.scaling[name])


def is_hooked(layer: nn.Module) -> bool:
    """Whether something else runs when the module is called, before or after its forward."""
    return any(vars(layer)[kind] for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))


def find_adapter(path: str) -> Path:
    """The folder of an adapter: `path` itself, or where the hub's files of that name were put.

    Raises:
        AdapterError: when it holds no adapter, or one whose weights are a pickle file.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "~", "/")):
        with reading(path):
            folder = Path(snapshot_download(path, allow_patterns=[CONFIG_FILE, "*.safetensors", "tokenizer*", "*.jinja"]))
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"no adapter at '{path}': expected a folder with {CONFIG_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        why = "its weights are missing"
        if (folder / "adapter_model.bin").is_file():
            why = "its weights are 'adapter_model.bin', a pickle file that can run code when it is read"
        raise AdapterError(f"the adapter '{path}' cannot be loaded: {why}; expected {WEIGHTS_FILE}")
    return folder.resolve()


def read_config(folder: Path) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        AdapterError: when it cannot be read, or is of another kind than LoRA.
    """
    file = folder / CONFIG_FILE
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"not an adapter configuration ({error})", where=Where(file=str(file))) from error
    if kind != "LORA":
        raise AdapterError(f"an adapter of kind {kind}, expected LORA", where=Where(file=str(file), field="peft_type"))
    with _fitting(folder):
        config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def _wrap(model: PreTrainedModel, config: LoraConfig, *, revision: str | None = None) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # PEFT asks a question by a name that transformers has renamed: nothing a user could act on.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            quantized = any(parameter.dtype in _QUANTIZED for parameter in model.parameters())
            import_utils.is_bnb_available.cache_clear()
            import_utils.is_bnb_4bit_available.cache_clear()
            with nullcontext() if quantized else hidden("bitsandbytes"):
                wrapped = get_peft_model(model, config, adapter_name=_NAME, revision=revision)
            import_utils.is_bnb_available.cache_clear()
            import_utils.is_bnb_4bit_available.cache_clear()
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise AdapterError(f"the adapter does not fit the model: {str(error).strip().splitlines()[0]}") from error
    assert isinstance(wrapped, PeftModel)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.init_lora_weights in _MOVES_BASE:
        _remember_start(wrapped)
    return wrapped


def _check(model: PreTrainedModel, adapter: Adapter, targets: Targets) -> None:
    """What PEFT would only find out in the middle of the work, or not at all."""
    if targets.smallest < adapter.rank:
        raise AdapterError(
            f"adapter.rank {adapter.rank} is larger than '{targets.smallest_name}', whose smaller side is {targets.smallest}"
        )
    if _tied(model) and (shared := {name.rpartition(".")[2] for name in targets.modules} & set(_embedding_names(model))):
        raise AdapterError(
            f"adapter.targets: '{shared.pop()}' shares its weight with another layer, so it cannot have an adapter of its own",
            hint="Train it whole with adapter.save_modules.",
        )
    if targets.parameters and (adapter.dropout or adapter.dora):
        what = "adapter.dropout" if adapter.dropout else "adapter.dora"
        raise AdapterError(
            f"{what} does not work on the experts of this mixture-of-experts model ({targets.parameters[0]})",
            hint="Leave it out, or set adapter.targets: attention",
        )
    if targets.parameters and adapter.init not in ("default", "gaussian"):
        raise AdapterError(f"adapter.init: {adapter.init} does not work on the experts of this mixture-of-experts model")
    if adapter.init == "olora" and targets.transposed:
        raise AdapterError(f"adapter.init: olora does not work on the transposed layers of this model ({targets.modules[0]})")
    if adapter.init == "orthogonal" and adapter.rank % 2:
        raise AdapterError(f"adapter.init: orthogonal needs an even rank, found {adapter.rank}")
    if adapter.init not in _MOVES_BASE:
        return
    if adapter.dora:
        raise AdapterError(f"adapter.init: {adapter.init} does not work together with adapter.dora")
    if any(parameter.dtype in _QUANTIZED for parameter in model.parameters()):
        raise AdapterError(f"adapter.init: {adapter.init} changes the base weights, which a quantised model does not allow")


def _task(model: PreTrainedModel) -> Any:
    """What PEFT is told that the model does; a classification model that gets an adapter says it when it is saved."""
    return "CAUSAL_LM" if model.can_generate() else None


def _token_rows(model: PreTrainedModel, ids: Sequence[int], whole: Sequence[str]) -> dict[str, list[int]]:
    """Which rows of which embedding are trained. A tied head follows the input embedding by itself; what is trained whole needs no rows."""
    names = _embedding_names(model)[: 1 if _tied(model) else 2]
    return {name: sorted(set(ids)) for name in names if ids and name not in whole}


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Short names of the input embedding and the output head, e.g. `embed_tokens` and `lm_head`."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return [names[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _number(value: float) -> Any:
    """PEFT writes alpha as it gets it; whole numbers stay whole, as everyone else writes them."""
    return int(value) if float(value).is_integer() else value


def _moved_layers(model: nn.Module) -> list[LoraLayer]:
    return [
        module for module in model.modules() if isinstance(module, LoraLayer) and "start_a" in dict(module.named_buffers(recurse=False))
    ]  # pyright: ignore[reportAttributeAccessIssue]


def _remember_start(model: PeftModel) -> None:
    """Keeps what A and B began with: the base weight lacks exactly their product."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and _NAME in module.lora_A:
            layer: Any = module
            layer.register_buffer("start_a", layer.lora_A[_NAME].weight.detach().clone(), persistent=False)
            layer.register_buffer("start_b", layer.lora_B[_NAME].weight.detach().clone(), persistent=False)


@contextmanager
def _at_start(layer: Any) -> Generator[None]:
    """Inside, the layer has the A and B it began with, so that it computes what the untouched base layer does."""
    pairs = [(layer.lora_A[_NAME].weight, layer.start_a), (layer.lora_B[_NAME].weight, layer.start_b)]
    trained = [weight.data for weight, _ in pairs]
    for weight, start in pairs:
        weight.data = start
    try:
        yield
    finally:
        for (weight, _), data in zip(pairs, trained, strict=True):
            weight.data = data


def _without_start(model: PeftModel, state: dict[str, torch.Tensor], config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """B A - B0 A0 as one product: A over A0, and B beside -B0. The scaling stays what it was."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    doubled = dict(state)
    for name, layer in layers.items():
        doubled[f"{name}.lora_A.weight"] = torch.cat([layer.lora_A[_NAME].weight, layer.start_a])
        doubled[f"{name}.lora_B.weight"] = torch.cat([layer.lora_B[_NAME].weight, -layer.start_b], dim=1)
    config.r *= 2
    config.lora_alpha = _number(config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2))
    config.init_lora_weights = True
    return doubled, config


@contextmanager
def _fitting(folder: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise AdapterError(f"the adapter cannot be loaded: {lines[-1].strip()}", where=Where(file=str(folder))) from error
