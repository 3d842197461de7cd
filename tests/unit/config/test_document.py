from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.document import Fault, from_python, nearest_file, read_file, read_value
from burnish.core.errors import Where


def read(folder: Path, text: str | bytes) -> tuple[object, list[str]]:
    file = Path("run.yaml")
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    faults: list[Fault] = []
    entry = read_file(file, faults)
    return entry.plain() if entry else None, [str(fault) for fault in faults]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("'5'", "5"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_values_are_read_as_yaml_1_2(folder: Path, written: str, value: object) -> None:
    plain, faults = read(folder, f"key: {written}")
    assert faults == []
    assert plain == {"key": value} and type(plain["key"]) is type(value)  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


def test_every_value_knows_its_line(folder: Path) -> None:
    Path("run.yaml").write_text("# comment\nmodel:\n  path: x\ndata:\n  train:\n    - a\n    - path: b\n      limit: 3\n")
    entry = read_file(Path("run.yaml"), [])
    assert entry
    lines = {key: where.line for key, where in entry.places().items()}
    assert lines == {
        "model": 2,
        "model.path": 3,
        "data": 4,
        "data.train": 5,
        "data.train.0": 6,
        "data.train.1": 7,
        "data.train.1.path": 7,
        "data.train.1.limit": 8,
    }


def test_anchors_and_merges(folder: Path) -> None:
    plain, faults = read(folder, "a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: {<<: [{p: 9}, *x]}\nd: *x\n")
    assert faults == []
    assert plain == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": {"p": 9, "q": 2}, "d": {"p": 1, "q": 2}}


def test_all_duplicate_keys_are_reported_with_both_lines(folder: Path) -> None:
    _, faults = read(folder, "a: 1\nb: {x: 1, x: 2}\na: 2\n")
    assert faults == ["run.yaml:2: x: the key is given twice, first on line 2", "run.yaml:3: a: the key is given twice, first on line 1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n", "run.yaml:1: expected keys and values"),
        ("just words", "expected keys and values"),
        ("a: [1\nb: 2\n", "run.yaml:2: is not valid YAML"),
        ("a: b: c\n", "run.yaml:1: is not valid YAML: an unexpected ': '"),
        ("\ta: 1", "TAB"),
        ("a: 'x\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: *nope", "undefined alias 'nope'"),
        ("a: \x07", "not valid YAML"),
        ("a: &a [*a]", "not valid YAML"),
        ("? [1]\n: 2", "a key must be a word"),
        ("a: !!python/object:os.system x", "not allowed"),
        ("<<: 3", "mappings only"),
        (b"a: \xff\xfe\n", "run.yaml:1: is not UTF-8 text (byte 0xff)"),
    ],
)
def test_broken_files_get_a_sentence(folder: Path, text: str | bytes, words: str) -> None:
    _, faults = read(folder, text)
    assert len(faults) == 1
    assert words in faults[0]
    assert "\n" not in faults[0]


def test_a_bomb_of_aliases_is_refused(folder: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9))
    _, faults = read(folder, "l0: &l0 [x]\n" + levels)
    assert faults == ["run.yaml: is not valid YAML: more than 100000 values"]


def test_a_byte_order_mark_is_no_fault(folder: Path) -> None:
    assert read(folder, b"\xef\xbb\xbfa: 1") == ({"a": 1}, [])


def test_missing_files_and_folders(folder: Path) -> None:
    faults: list[Fault] = []
    Path("run.yaml").write_text("a: 1")
    assert read_file(Path("rnu.yaml"), faults) is None
    assert read_file(Path("run.yml"), faults) is None
    assert read_file(Path("zzz.yaml"), faults) is None
    assert read_file(folder, faults) is None
    assert [fault.message for fault in faults] == [
        "no such file; did you mean run.yaml?",
        "no such file; did you mean run.yaml?",
        "no such file",
        "is a folder, expected a run file",
    ]


def test_a_common_suffix_makes_no_names_alike(folder: Path) -> None:
    Path("cars.jsonl").write_text("")
    assert nearest_file(Path("bikes.jsonl")) is None
    assert nearest_file(Path("crs.jsonl")) == "cars.jsonl"


@pytest.mark.parametrize("text", ["[a", "@x", "a: b: c"])
def test_values_that_are_no_yaml(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_value(text)


def test_a_fault_says_place_key_and_message() -> None:
    fault = Fault("must not be empty", "data.train", Where("run.yaml", 3))
    assert str(fault) == "run.yaml:3: data.train: must not be empty"
    assert fault.to_json() == {"file": "run.yaml", "line": 3, "key": "data.train", "message": "must not be empty"}
    assert str(Fault("train.epochs is wrong", "train.epochs")) == "train.epochs is wrong"


def test_trees_of_python_values(folder: Path) -> None:
    entry = from_python({"a": [1, {"b": Path("x")}], 2: ("y",)}, folder)
    assert entry.plain() == {"a": [1, {"b": "x"}], "2": ["y"]}
    assert entry.at(("a", 1, "b")) and entry.at(("a", 5)) is None and entry.at(("a", "b")) is None and entry.at(("a", 0, "c")) is None
    entry.put("c", from_python(3, folder))
    assert entry.mapping["c"].value == 3 and entry.mapping["a"].mapping == {}
