"""Wrong input, given to the real command: one clear message, exit code 2, no traceback, nothing written.

Every case is what a tired person does: a typo, a half-copied file, rows of the wrong shape. `expect` are words that the message must hold.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from burnish.cli.main import main

GOOD = [{"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]} for i in range(8)]


def jsonl(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def messages(*turns: tuple[str, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@dataclass
class Case:
    name: str
    expect: tuple[str, ...]
    data: bytes | None = jsonl(GOOD)
    file: str = "rows.jsonl"
    yaml: str = ""  # lines added to the run file, or the whole of it with whole=True
    whole: bool = False
    overrides: tuple[str, ...] = ()
    model: Callable[[Path], None] | None = None  # spoils a copy of the model folder
    extra: dict[str, bytes] = field(default_factory=dict)


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        no_template(folder)
        (folder / "chat_template.jinja").write_text(text)

    return write


def torn_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def lost_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CASES = [
    # the run file
    Case("unknown key", ("learning_rat", "learning_rate", "run.yaml:"), yaml="train: {learning_rat: 1.0e-4}"),
    Case("unknown section", ("trian", "train"), yaml="trian: {epochs: 1}"),
    Case("key in the wrong section", ("learning_rate", "train.learning_rate"), yaml="learning_rate: 1.0e-4"),
    Case("text for a number", ("epochs", "many"), yaml="train: {epochs: many}"),
    Case("number out of range", ("dropout", "1.5"), yaml="adapter: {kind: lora, dropout: 1.5}"),
    Case("unknown choice", ("cosin", "cosine"), yaml="train: {schedule: cosin}"),
    Case("bad duration", ("every", "1 epoch", "2ep"), yaml="save: {every: 1 epoch}"),
    Case("contradiction", ("batch_size", "batch_tokens"), yaml="train: {batch_size: 4, batch_tokens: 4096}"),
    Case("quantised without adapter", ("quantize", "adapter"), overrides=("model.quantize=nf4", "adapter=null")),
    Case("kernels of another kind", ("model.kernels", "'auto' or 'off'", "fast"), overrides=("model={path: ./model, kernels: fast}",)),
    Case("tile of no tokens", ("train.mlp_tile", "at least 1"), overrides=("train.mlp_tile=0",)),
    Case("offloading without recomputing", ("offload_activations", "checkpoint_activations"),
         overrides=("train.offload_activations=true", "train.checkpoint_activations=off")),
    Case("key of the wrong section", ("kernels", "model.kernels"), overrides=("kernels=off",)),
    Case("key one level too high", ("in_backward", "train.optimizer.in_backward"), overrides=("train.in_backward=true",)),
    Case("update in backward with a norm", ("in_backward", "train.clip: null"), overrides=("train.optimizer={in_backward: true}",)),
    Case("update in backward with loss scaling", ("in_backward", "float16"),
         overrides=("train.optimizer={in_backward: true}", "train.clip=null", "train.precision=float16")),
    Case("update in backward of several micro-batches", ("in_backward", "micro_batch_tokens"),
         overrides=("train.optimizer={in_backward: true}", "train.clip=null", "train.micro_batch_tokens=16")),
    Case("duplicate key", ("output", "run.yaml"), yaml="output: a\noutput: b"),
    Case("broken YAML", ("run.yaml",), yaml="model: [unclosed\nother", whole=True),
    Case("empty run file", ("run.yaml",), yaml="", whole=True),
    Case("no data section", ("data",), yaml="model: x", whole=True),
    Case("unknown override", ("train.epoch", "train.epochs"), overrides=("train.epoch=2",)),
    Case("override without value", ("train.epochs",), overrides=("train.epochs",)),
    Case("unset environment variable", ("BURNISH_TEST_UNSET",), overrides=("output=${BURNISH_TEST_UNSET}/x",)),
    Case("extends itself", ("extends",), yaml="extends: run.yaml"),
    # files
    Case("missing data file", ("rows.jsonl",), data=None),
    Case("nearest data file is named", ("rows.json", "rows.jsonl"), overrides=("data.train=rows.json",)),
    Case("empty data file", ("rows.jsonl", "empty"), data=b""),
    Case("truncated JSON", ("rows.json", "line"), data=b'[{"text": "one"},\n {"text": "tw', file="rows.json"),
    Case("broken JSON line", ("rows.jsonl", "3"), data=jsonl(GOOD[:2]) + b'{"messages": [}\n' + jsonl(GOOD[2:])),
    Case("JSON line that is no object", ("rows.jsonl", "row 2"), data=jsonl([GOOD[0], 7])),
    Case("bad UTF-8", ("rows.jsonl", "UTF-8"), data=jsonl(GOOD[:2]) + b'{"messages": "\xff\xfe"}\n'),
    Case("torn gzip", ("rows.jsonl.gz",), data=gzip.compress(jsonl(GOOD * 50), mtime=0)[:60], file="rows.jsonl.gz"),
    Case("not a parquet file", ("rows.parquet",), data=b"PAR1 no", file="rows.parquet"),
    Case("unknown suffix", ("rows.xyz",), file="rows.xyz"),
    Case("NaN in CSV", ("row 2", "answer"), data=b"question,answer\nwhat,that\nwhy,NaN\n", file="rows.csv"),
    Case("CSV row with too many cells", ("rows.csv",), data=b"prompt,completion\na,b\nc,d,e\n", file="rows.csv"),
    Case("model folder for data", ("folder of a model",), overrides=("data.train=./model",)),
    Case("output inside a file", ("rows.jsonl", "is a file"), overrides=("output=rows.jsonl/run",)),
    # rows
    Case("unknown columns", ("foo", "format"), data=jsonl([{"foo": 1, "bar": 2}] * 3)),
    Case(
        "ambiguous columns",
        ("format:",),
        data=jsonl([{"messages": GOOD[0]["messages"], "text": "plain", "prompt": "a", "completion": "b"}] * 3),
    ),
    Case("unknown role", ("row 1", "asistant", "assistant"), data=jsonl([messages(("user", "a"), ("asistant", "b"))])),
    Case("message without role", ("row 2", "role"), data=jsonl([GOOD[0], {"messages": [{"content": "a"}]}])),
    Case("content is a number", ("row 2", "content"), data=jsonl([GOOD[0], messages(("user", 5), ("assistant", "b"))])),
    Case("no assistant turn", ("row 2",), data=jsonl([GOOD[0], messages(("user", "a"))])),
    Case("empty conversation", ("row 2", "messages"), data=jsonl([GOOD[0], {"messages": []}])),
    Case("image part", ("row 2", "image"),
         data=jsonl([GOOD[0], messages(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "b"))])),
    Case("mapped column is absent", ("questoin", "question"), data=jsonl([{"question": "a", "answer": "b"}]),
         overrides=("data.train={path: rows.jsonl, format: prompt_completion, columns: {prompt: questoin, completion: answer}}",)),
    Case("unknown format", ("sharegtp", "sharegpt"), overrides=("data.train={path: rows.jsonl, format: sharegtp}",)),
    Case("tool arguments are no JSON", ("row 1", "arguments"), data=jsonl([{"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{oops"}}]},
    ]}])),
    Case("nothing trained", ("trained",), data=jsonl(GOOD), overrides=("data.max_length=4",)),
    Case("overlong is an error", ("row 1", "max_length"), overrides=("data.overlong=error", "data.max_length=4")),
    Case("labels of another length", ("row 1", "labels"), data=jsonl([{"input_ids": [1, 2, 3], "labels": [1, 2]}])),
    Case("token outside the vocabulary", ("row 1", "99999"), data=jsonl([{"input_ids": [1, 99999, 3], "labels": [1, 2, 3]}])),
    Case("eval share holds no row", ("eval",), data=jsonl(GOOD[:1]), overrides=("data.eval=0.1",)),
    # the model
    Case("missing model folder", ("no-such-model",), overrides=("model=./no-such-model",)),
    Case("model folder without config", ("config.json",), model=lambda folder: (folder / "config.json").unlink()),
    Case("no chat template", ("chat_template", "chatml"), model=no_template),
    Case("template without an end token", ("end",), model=template("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")),
    Case("template with a syntax error", ("template",), model=template("{% for m in messages %}{{ m.content ")),
    Case("template that refuses the roles", ("row 1", "alternate"), model=template(
        "{% for m in messages %}{% if m.role == 'user' and not loop.first %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"),
        data=jsonl([messages(("user", "a"), ("user", "b"), ("assistant", "c"))])),
    Case("torn weights", ("model.safetensors",), model=torn_weights),
    Case("pickled weights", ("safetensors",), model=pickled_weights),
    Case("weights without a layer", ("layers.1.mlp.up_proj",), model=lost_layer),
    Case("unknown adapter target", ("q_porj", "q_proj"), overrides=("adapter={kind: lora, targets: [q_porj]}",)),
    Case("rate group that matches nothing", ("lora_Q",), overrides=('train.rates=[{match: lora_Q, learning_rate: 1.0e-3}]',)),
    Case("objective that does not exist", ("sfft", "sft"), overrides=("objective=sfft",)),
    Case("plug-in file missing", ("my_loss.py",), overrides=("objective=./my_loss.py:MyLoss",)),
    Case("plug-in without the class", ("MyLoss",), overrides=("objective=./my_loss.py:MyLoss",),
         extra={"my_loss.py": b"class Other: pass\n"}),
]  # fmt: skip

RUN = """model: ./model
adapter: {kind: lora, rank: 4, alpha: 8}
data: {train: %s, max_length: 64, cache: ./cache}
"""


def set_up(case: Case, folder: Path, tiny_model: Path) -> list[str]:
    import shutil

    shutil.copytree(tiny_model, folder / "model")
    if case.model:
        case.model(folder / "model")
    if case.data is not None:
        (folder / case.file).write_bytes(case.data)
    for name, content in case.extra.items():
        (folder / name).write_bytes(content)
    text = case.yaml if case.whole else _merged(RUN % case.file, case.yaml)
    (folder / "run.yaml").write_text(text)
    return ["train", "run.yaml", *case.overrides]


def _merged(base: str, added: str) -> str:
    """The base run file with `added` lines, which replace a section of the same name."""
    keys = {line.split(":")[0] for line in added.splitlines()}
    return "".join(line + "\n" for line in base.splitlines() if line.split(":")[0] not in keys) + added + "\n"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gets_one_clear_message(
    case: Case, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = set_up(case, tmp_path, tiny_model)
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).split())
    assert stop.value.code == 2, said
    assert "Traceback" not in said
    missing = [word for word in case.expect if word.lower() not in said.lower()]
    assert not missing, f"the message does not say {missing}: {said}"
    left = files(tmp_path) - before
    assert not {name for name in left if not name.startswith("cache/")}, left


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", ["unknown key", "truncated JSON", "nothing trained"])
def test_the_same_through_a_real_process(name: str, tiny_model: Path, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    arguments = set_up(case, tmp_path, tiny_model)
    done = subprocess.run([sys.executable, "-m", "burnish", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert all(word.lower() in " ".join(done.stderr.split()).lower() for word in case.expect)
    assert not (tmp_path / "runs").exists()
