"""Loads a model's weights: hub id, folder, GGUF file or `package:NAME`; whole, or quantised under an adapter.

Nothing is ever filled in silently: a weight that the checkpoint lacks, or has too many, is an error. Weights are read from safetensors (or
GGUF) only, because the older pickle files can run code when they are read; and a model's own Python code runs only when asked for.
"""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from burnish.config.sections import Model
from burnish.core.errors import ConfigError, DependencyError, ModelError, Where
from burnish.models.locate import Location, locate, reading, require_hub
from burnish.models.quantized import store_fp8
from burnish.models.quiet import quiet

T = TypeVar("T")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCORERS: dict[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
"""Models that score text instead of writing it, by the end of their class's name."""
_NOTHING_READ: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": (), "error_msgs": ()}
_LISTED = 5  # this many names of weights stand in a message


def load_model(
    model: Model,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trainable: bool = False,
    attention: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    scorer: bool = False,
    weights: bool = True,
) -> PreTrainedModel:
    """Loads a causal language model, in evaluation mode.

    Args:
        model: What to load.
        compute_dtype: Type of the matrix products; what `model.dtype: auto` stores frozen weights in.
        device: Where the weights go.
        trainable: All weights are to be trained (no adapter), so they are kept in float32.
        attention: Name in transformers' AttentionInterface; None is `sdpa`, or `eager` where the model cannot do that (Gemma 2). What
            config.json asks for is not followed: it may name code on the hub. `model.attention` is the caller's to translate.
        tokenizer: When given, the embeddings are grown to hold all its tokens if `model.new_tokens` asks for new ones, and it is an
            error if the tokenizer has more tokens than the model otherwise.
        scorer: A classification model (a reward model) will do as well.
        weights: Without, only the configuration is read, and all tensors are on torch's meta device: for ranks that are given them.

    Raises:
        ModelError: when the model cannot be loaded, or its weights are not exactly those that its configuration asks for.
        DependencyError: when a needed package is not installed.
        ConfigError: when a quantised model is to be trained whole.
    """
    if trainable and model.quantize != "none":
        raise ConfigError(f"model.quantize: {model.quantize} needs an adapter: quantised weights cannot be trained")
    dtype = torch.float32 if trainable else _DTYPES.get(model.dtype, compute_dtype)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device},
        "quantization_config": _quantization(model, compute_dtype),
        "output_loading_info": True,
    }
    place = locate(model.path)
    with reading(model.path), quiet(downloads=place.kind == "hub"):
        loaded, report = _load(model, place, options, attention) if weights else (_empty(model, place, options, attention), _NOTHING_READ)
    if not scorer and not loaded.can_generate():
        raise ModelError(f"'{model.path}' is a {type(loaded).__name__}, expected a language model, which writes text")
    _check_complete(model.path, report)
    loaded.name_or_path = model.path if model.path.startswith("package:") else place.path  # what an adapter records as its base
    _train_padding(loaded)
    _keep_blocks(loaded)
    if model.quantize == "fp8":
        store_fp8(loaded)
    if tokenizer is not None:
        fit_vocabulary(loaded, tokenizer, model.new_tokens)
    return loaded


def describe(model: Model) -> PreTrainedModel:
    """The model that its configuration alone tells of, without weights (on the meta device)."""
    place = locate(model.path)
    with reading(model.path), quiet():
        return _without_weights(model, place, {})


def stored_bytes(model: Model, compute_dtype: torch.dtype) -> float:
    """Bytes of each frozen weight as it is stored."""
    quantized = {"nf4": 0.5 + 0.13 / 8, "int8": 1.0, "fp8": 1.0}  # nf4 has a scale for 64 weights (2305.14314, section 3)
    return quantized.get(model.quantize) or _DTYPES.get(model.dtype, compute_dtype).itemsize


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, new_tokens: Iterable[str] = ()) -> None:
    """Gives every token of the tokenizer an embedding. The rows of `new_tokens` start as the mean of all old rows.

    Rows are added where there are too few, and never taken away (many models have more rows than tokens). Tied embeddings stay tied.

    Raises:
        ModelError: when the tokenizer has more tokens than the model, and not because of `new_tokens`.
    """
    vocabulary = tokenizer.get_vocab()
    rows = int(_embedding_tables(model)[0].shape[0])
    fresh = sorted({vocabulary[token] for token in new_tokens})
    needed = max(vocabulary.values()) + 1
    unknown = [index for index in range(rows, needed) if index not in fresh]
    if unknown:
        raise ModelError(f"the tokenizer has {needed} tokens, the model has embeddings for {rows} only: they do not belong together")
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    old = min(rows, min(fresh, default=rows))
    for table in _embedding_tables(model):
        with torch.no_grad():
            table[fresh] = table[:old].float().mean(dim=0).to(table.dtype)


def _embedding_tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """Input and output embeddings, once if they are tied."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


def _load(model: Model, place: Location, options: dict[str, Any], attention: str | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    load = _from_gguf if place.kind == "gguf" else _from_folder_or_hub
    return _with_attention(attention, lambda name: load(model, place, {**options, "attn_implementation": name}))


def _empty(model: Model, place: Location, options: dict[str, Any], attention: str | None) -> PreTrainedModel:
    """The same model, in evaluation mode, its tensors on the meta device."""
    dtype = options["dtype"]
    made = _with_attention(attention, lambda name: _without_weights(model, place, {"dtype": dtype, "attn_implementation": name}))
    return made.eval()


def _with_attention(attention: str | None, load: Callable[[str], T]) -> T:
    """Loads with the attention of that name; with `sdpa`, or what there is instead, where there is none."""
    try:
        return load(attention or "sdpa")
    except ValueError as error:
        if attention is not None or "scaled_dot_product_attention" not in str(error):
            raise
    return load("eager")


def _without_weights(model: Model, place: Location, options: dict[str, Any]) -> PreTrainedModel:
    """The model that the configuration tells of, on the meta device."""
    with torch.device("meta"):
        if place.kind == "gguf":
            from burnish.models.gguf import GGUFFile
            from burnish.models.gguf_weights import read_config

            return AutoModelForCausalLM.from_config(read_config(GGUFFile(place.path)), **options)
        trust = {"trust_remote_code": model.trust_remote_code}
        config: Any = AutoConfig.from_pretrained(place.path, revision=model.revision, **trust)
        return _loader_of(config.architectures).from_config(config, **trust, **options)


def _from_gguf(model: Model, place: Location, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    from burnish.models.gguf import GGUFFile  # here: the gguf package takes its time, and most models come otherwise
    from burnish.models.gguf_weights import read_config, read_weights

    file = GGUFFile(place.path)
    config = read_config(file)
    weights = read_weights(file, config, options["dtype"])
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=weights, **options)


def _from_folder_or_hub(model: Model, place: Location, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    if place.kind == "hub":
        require_hub(place.path, model.revision)
    else:
        _check_weight_files(Path(place.path))
    config, _ = PreTrainedConfig.get_config_dict(place.path, revision=model.revision)
    return _loader_of(config.get("architectures")).from_pretrained(
        place.path, revision=model.revision, trust_remote_code=model.trust_remote_code, use_safetensors=True, **options
    )


def _loader_of(architectures: Sequence[str] | None) -> Any:
    """The class that loads models of such a kind."""
    named = str(next(iter(architectures or ()), ""))
    return next((kind for ending, kind in _SCORERS.items() if named.endswith(ending)), AutoModelForCausalLM)


def _check_weight_files(folder: Path) -> None:
    if weights := sorted(folder.glob("*.safetensors")):
        _check_whole(weights)
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"'{folder}' holds its weights as '{pickled[0]}', a pickle file that can run code when it is read; expected *.safetensors",
            hint="Convert it on a machine that may run such a file, e.g. with save_pretrained of transformers.",
        )
    raise ModelError(f"'{folder}' holds no weights, expected *.safetensors")


def _check_whole(files: Iterable[Path]) -> None:
    """Reads the headers, which tell how long each file must be: half-copied weights are named before anything is loaded."""
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(f"the weights are torn or no safetensors: {error}", where=Where(file=str(file))) from None


def _quantization(model: Model, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """QLoRA's choices (2305.14314): NF4 blocks, the block scales quantised once more, products in the compute type."""
    if model.quantize in ("none", "fp8"):  # FP8 is made after loading
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(f"model.quantize: {model.quantize} needs the package 'bitsandbytes'", hint="pip install 'burnish[quant]'")
    if model.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute_dtype
    )


def _check_complete(path: str, report: dict[str, Any]) -> None:
    """No weight may be made up, left over, or of another shape."""
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    faults = [
        _listing("lacks", report["missing_keys"]),
        _listing("has no place for", report["unexpected_keys"]),
        _listing("has other shapes for", mismatched),
        "; ".join(report["error_msgs"]),
    ]
    found = "; ".join(fault for fault in faults if fault)
    if found:
        raise ModelError(f"the weights of '{path}' do not fit its configuration: it {found}")


def _listing(verb: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return f"{verb} {', '.join(ordered[:_LISTED])}{more}" if ordered else ""


def _keep_blocks(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking NF4 weights at the first evaluation on a CPU.

    The repacked form rounds the block scales to bfloat16, so that looking at the eval loss would change the training after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # for the type checker: nn.Module takes tensors only


def _train_padding(model: PreTrainedModel) -> None:
    """Lets the padding token's embedding be trained.

    Batches here are never padded, and in many models the padding token is the end token, whose gradient `padding_idx` would zero.
    """
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding):
        embeddings.padding_idx = None
