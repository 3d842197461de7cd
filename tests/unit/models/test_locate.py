from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from burnish.core.errors import DependencyError, ModelError
from burnish.models import locate as module
from burnish.models.locate import locate, reading, require_hub


def package(folder: Path, name: str, *files: str) -> None:
    inside = folder / name
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
    for file in files:
        (inside / file).write_bytes(b"GGUF")


def test_folder_with_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    place = locate("m")
    assert (place.kind, place.path, place.label) == ("folder", str(tmp_path / "m"), "m")


def test_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_1.gguf").write_bytes(b"GGUF")
    place = locate(str(tmp_path / "m.Q4_1.gguf"))
    assert (place.kind, place.label) == ("gguf", "m.Q4_1")


@pytest.mark.parametrize("name", ["gpt2", "org/model-1.5B_x", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_ids(name: str) -> None:
    assert (locate(name).kind, locate(name).path) == ("hub", name)


@pytest.mark.parametrize(
    "path",
    ["missing.gguf", "./missing", "/no/such/place", "~/nothing-here", "a/b/c", "org/../../etc", "../x/y", "https://x.org/m", "a b"],
)
def test_what_is_nothing_is_said_so(path: str) -> None:
    with pytest.raises(ModelError, match="no model at"):
        locate(path)


def test_package_file_is_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "with_one", "model.gguf", "notes.txt")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:with_one").path == str(tmp_path / "with_one" / "model.gguf")
    assert "with_one" not in sys.modules


@pytest.mark.parametrize(("files", "found"), [((), "none"), (("a.gguf", "b.gguf"), "a.gguf, b.gguf")])
def test_package_with_none_or_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], found: str) -> None:
    package(tmp_path, "odd_one", *files)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=f"must hold exactly one .gguf file, found {found}"):
        locate("package:odd_one")


def test_package_that_is_not_installed_names_the_command() -> None:
    with pytest.raises(DependencyError, match="'no_such_package_here' is not installed") as caught:
        locate("package:no_such_package_here")
    assert caught.value.hint == "pip install no-such-package-here"


@pytest.mark.parametrize("name", ["os.path", "../evil", "", "a-b"])
def test_package_names_are_plain(name: str) -> None:
    with pytest.raises(ModelError, match="names no Python package"):
        locate(f"package:{name}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("x.gguf", "holds no config.json, but a GGUF file"),
        ("adapter_config.json", "is an adapter, expected a whole model"),
        ("run.yaml", "is no model folder"),
        ("y.txt", "is no model folder"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(ModelError, match=message):
        locate(str(tmp_path))


@pytest.mark.parametrize(("weights", "advice"), [("adapter_config.json", "adapter.path: "), ("config.json", "Name the model in it: ")])
def test_the_folder_of_a_run(tmp_path: Path, weights: str, advice: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "model" / weights).write_text("{}")
    with pytest.raises(ModelError, match="is the folder of a run, expected a model") as caught:
        locate(str(tmp_path))
    assert str(caught.value.hint).endswith(f"{advice}{tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("file", "text", "door"),
    [
        ("adapter_config.json", '{"task_type": "SEQ_CLS"}', "load_reward"),
        ("adapter_config.json", '{"task_type": "TOKEN_CLS"}', "load_process_reward"),
        ("config.json", '{"architectures": ["LlamaForSequenceClassification"]}', "load_reward"),
        ("config.json", '{"architectures": ["LlamaForTokenClassification"]}', "load_process_reward"),
    ],
)
def test_the_folder_of_a_run_that_made_a_reward_model(tmp_path: Path, file: str, text: str, door: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(ModelError) as caught:
        locate(str(tmp_path))
    assert caught.value.hint == f"It is a reward model. In Python: burnish.{door}({str(tmp_path)!r})"


def test_other_files_and_split_files(tmp_path: Path) -> None:
    for name, message in (("m.bin", r"expected a model folder or a \.gguf file"), ("m-00001-of-00003.gguf", "one part of a split GGUF")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelError, match=message):
            locate(str(tmp_path / name))


def test_hub_model_that_cannot_be_had_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for why in ("the hub's offline mode is on", "'huggingface.co' cannot be reached"):
        monkeypatch.setattr(module.hub, "silence", lambda why=why: why)
        with pytest.raises(ModelError, match=rf"no folder 'org/none-such' here, no model .* and {why}"):
            require_hub("org/none-such", None)


def test_hub_model_is_asked_for_where_there_is_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.hub, "silence", lambda: None)
    require_hub("org/none-such", None)


def test_what_was_downloaded_is_used_where_the_hub_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    noted: list[int] = []
    monkeypatch.setattr(module.hub, "silence", lambda: "it is away")
    monkeypatch.setattr(module.hub, "note_silence", lambda: noted.append(1))
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda name, file, revision: str(tmp_path) if file == "config.json" else None)
    require_hub("org/known", None)
    assert noted == [1]


@pytest.mark.parametrize(
    "error", [OSError("gone\nmore"), ValueError("gone"), SafetensorError("gone"), KeyError("gone"), RuntimeError("gone.")]
)
def test_errors_of_libraries_become_one_sentence(error: Exception) -> None:
    with pytest.raises(ModelError, match=r"^cannot load the model 'm': '?gone'?$") as caught, reading("m"):
        raise error
    assert caught.value.__cause__ is error


def test_missing_packages_and_own_code_are_told_apart() -> None:
    with pytest.raises(DependencyError, match="needs a package that is not installed: tiktoken"), reading("m"):
        raise ImportError("tiktoken")
    with pytest.raises(ModelError) as caught, reading("m"):
        raise ValueError("please pass trust_remote_code=True")
    assert "model.trust_remote_code: true" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="as it was"), reading("m"):
        raise ModelError("as it was")
