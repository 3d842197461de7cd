from __future__ import annotations

import os
from pathlib import Path

import pytest

from burnish.core.errors import SourceError
from burnish.data.sources.find import find

from .reading import Read, fields, refusal


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    """Files of one row each, which holds the file's name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f'{{"text": "{name}"}}\n')


def splits(path: str, *, split_given: bool = True) -> dict[str, list[str]]:
    found = find(path, split_given=split_given)
    assert found is not None
    return {split: [file.path for file in files] for split, files in found.splits.items()}


def test_one_file_is_the_split_that_its_name_says(here: Path) -> None:
    make("alpaca.json", "alpaca_test.json")
    assert splits("alpaca.json") == {"train": ["alpaca.json"]}
    assert splits("alpaca_test.json") == {"test": ["alpaca_test.json"]}


@pytest.mark.parametrize("separator", ["/", "-"])
@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "eval", "evaluation"])
def test_a_folder_with_files_or_folders_named_after_splits(here: Path, separator: str, name: str) -> None:
    make(f"data/train{separator}0.jsonl", f"data/train{separator}1.jsonl", f"data/{name}{separator}0.jsonl", f"data/test{separator}0.jsonl")
    assert splits("data") == {
        "train": [f"data/train{separator}0.jsonl", f"data/train{separator}1.jsonl"],
        "validation": [f"data/{name}{separator}0.jsonl"],
        "test": [f"data/test{separator}0.jsonl"],
    }


def test_a_folder_without_splits_is_train(here: Path) -> None:
    make("data/b.jsonl", "data/sub/a.jsonl")
    assert splits("data") == {"train": ["data/b.jsonl", "data/sub/a.jsonl"]}
    assert splits("./data/") == {"train": ["./data/b.jsonl", "./data/sub/a.jsonl"]}


def test_the_folder_itself_announces_nothing(here: Path) -> None:
    make("test/a.jsonl", "test/b.jsonl")
    assert list(splits("test")) == ["train"]


def test_files_beside_a_validation_file_are_train(here: Path) -> None:
    make("data/alpaca.jsonl", "data/alpaca.val.jsonl")
    assert splits("data") == {"validation": ["data/alpaca.val.jsonl"], "train": ["data/alpaca.jsonl"]}


def test_files_beside_train_are_left_out_and_named(here: Path) -> None:
    make("data/train.jsonl", "data/extra.jsonl")
    found = find("data")
    assert found is not None
    assert found.left_out == ("data/extra.jsonl",)


def test_what_is_no_data_is_passed_over(here: Path) -> None:
    make(
        "data/a.jsonl",
        "data/README.md",
        "data/LICENSE.txt",
        "data/.hidden.jsonl",
        "data/.git/a.jsonl",
        "data/picture.png",
        "data/state.json",
    )
    assert splits("data") == {"train": ["data/a.jsonl"]}


def test_manifests_lead_nowhere(here: Path) -> None:
    make("outside/secret.jsonl", "data/a.jsonl")
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        Path("data", name).write_text('{"_data_files": [{"filename": "../outside/secret.jsonl"}], "file_name": "/etc/passwd"}')
    assert splits("data") == {"train": ["data/a.jsonl"]}


def test_links_to_files_are_followed_and_links_to_folders_are_not(here: Path) -> None:
    make("blobs/1234.jsonl", "other/b.jsonl")
    Path("data").mkdir()
    os.symlink("../blobs/1234.jsonl", "data/a.jsonl")
    os.symlink("../other", "data/other")
    os.symlink(".", "data/loop")
    assert splits("data") == {"train": ["data/a.jsonl"]}


def test_a_glob_means_all_that_it_matches_unless_a_split_is_asked_for(here: Path) -> None:
    make("data/train.jsonl", "data/val.jsonl", "data/deep/train.jsonl", "data/notes.png")
    assert splits("data/*.jsonl", split_given=False) == {"train": ["data/train.jsonl", "data/val.jsonl"]}
    assert splits("data/*", split_given=True) == {"train": ["data/train.jsonl"], "validation": ["data/val.jsonl"]}
    assert splits("data/**/train.jsonl", split_given=False) == {"train": ["data/deep/train.jsonl", "data/train.jsonl"]}


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    make("a.jsonl")
    assert splits("~/a.jsonl") == {"train": [str(here / "a.jsonl")]}


@pytest.mark.parametrize("path", ["squad", "tatsu-lab/alpaca", "HuggingFaceH4/ultrachat_200k", "teknium/OpenHermes-2.5"])
def test_hub_names(here: Path, path: str) -> None:
    assert find(path) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("alpca.json", "alpca.json: there is no such file or folder; did you mean 'alpaca.json'?"),
        ("alpaca.jsno", "alpaca.jsno: there is no such file or folder; did you mean 'alpaca.json'?"),
        ("data/trian.jsonl", "data/trian.jsonl: there is no such file or folder; did you mean 'data/train.jsonl'?"),
        ("dta/train.jsonl", "dta/train.jsonl: there is no such file or folder; did you mean 'data'?"),
        ("data/other", "data/other: there is no such file or folder (looked in '"),
        ("./nothing", "./nothing: there is no such file or folder (looked in '"),
        ("/no/such/place.json", "/no/such/place.json: there is no such file or folder"),
        ("data/*.csv", "data/*.csv: no data file matches this pattern"),
        ("empty", "empty: the folder holds no data file (.json, .jsonl, "),
        ("mixed", "mixed: files of several kinds stand side by side (a.csv, a.jsonl), perhaps the same rows twice"),
    ],
)
def test_what_is_not_found(here: Path, path: str, message: str) -> None:
    make("alpaca.json", "data/train.jsonl", "mixed/a.jsonl", "mixed/a.csv")
    Path("empty").mkdir()
    with pytest.raises(SourceError) as caught:
        find(path)
    assert str(caught.value).startswith(message)


def test_the_folder_of_a_model_is_no_data(here: Path) -> None:
    make("model/config.json", "model/tokenizer.json")
    assert find("model") is not None
    make("model/model.safetensors")
    with pytest.raises(SourceError, match="model: this is the folder of a model, expected data"):
        find("model")


def test_rows_of_a_split_come_file_by_file(read: Read) -> None:
    make("data/train-1.jsonl", "data/train-0.jsonl", "data/test.jsonl")
    assert [row["text"] for row in fields(read("data", split="train"))] == ["data/train-0.jsonl", "data/train-1.jsonl"]
    assert [row["text"] for row in fields(read("data", split="testing"))] == ["data/test.jsonl"]
    assert [row["text"] for row in fields(read("data", split="train[-1:]+test"))] == ["data/train-1.jsonl", "data/test.jsonl"]
    assert refusal(read, "data", split="tset") == "data, field 'split': there is no split 'tset': did you mean 'test'?"
