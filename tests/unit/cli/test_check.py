"""`burnish check`, run through the real entry point: what it prints, its exit code, and that it writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.cli.main import main

GOOD = "model: org/model\nadapter: lora\ndata: {train: rows.jsonl}\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `burnish ARGUMENTS` in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(GOOD)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err  # pyright: ignore[reportReturnType]

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("file", "overrides", "words"),
    [
        (GOOD + "train: {learning_rat: 1e-4}", [], ["run.yaml:4", "learning_rat", "did you mean 'learning_rate'"]),
        (GOOD + "learning_rate: 1e-4", [], ["run.yaml:4", "train.learning_rate"]),
        (GOOD + "num_train_epochs: 3", [], ["train.epochs"]),
        (GOOD + "train: {epochs: -1}", [], ["train.epochs: must be above 0, found -1"]),
        (GOOD + "train: {epochs: 1, steps: 5}", [], ["epochs and steps", "exclude each other"]),
        (GOOD + "train: {optimizer: adamm}", [], ["did you mean 'adamw'"]),
        (GOOD + "train:\n   epochs: 1\n  seed: 2", [], ["run.yaml:6", "not valid YAML"]),
        (GOOD + "train: [epochs, 1]", [], ["expected a section", "a list of 2"]),
        (GOOD + "model: other", [], ["run.yaml:4: model: the key is given twice, first on line 1"]),
        (GOOD + "save: {every: weekly}", [], ["expected a duration like '2ep'", "'weekly'"]),
        (GOOD + "extends: nope.yaml", [], ["extends: no such file"]),
        (GOOD + "extends: run.yaml", [], ["the file extends itself"]),
        (GOOD + "output: ${BURNISH_NEVER_SET}/x", [], ["BURNISH_NEVER_SET is not set"]),
        (GOOD + "objective: dop", [], ["unknown name 'dop'"]),
        (GOOD + "objective: ./loss.py:Mine", [], ["no Python file at", "loss.py"]),
        (GOOD + "adapter_rank: 3", [], ["unknown key 'adapter_rank'"]),
        ("model: org/model\n", [], ["data: is missing"]),
        ("", [], ["empty"]),
        ("- model\n", [], ["expected keys and values"]),
        ("model: [unclosed\nother", [], ["run.yaml:", "not valid YAML"]),
        ("{", [], ["not valid YAML"]),
        (GOOD, ["data.train=rows.json"], ["rows.json", "did you mean 'rows.jsonl'"]),
        (GOOD, ["model=./missing"], ["nothing at './missing'"]),
        (GOOD, ["model=package:not_there_at_all"], ["pip install not-there-at-all"]),
        (GOOD, ["model.quantize=nf4", "adapter=null"], ["needs an adapter"]),
        (GOOD, ["train.epoch=2"], ["did you mean 'train.epochs'"]),
        (GOOD, ["train.epochs"], ["expected key=value"]),
        (GOOD, ["train.epochs=soon"], ["expected a number", "'soon'"]),
        (GOOD, ["train.batch_tokens=100"], ["train.batch_tokens is 100", "data.max_length"]),
        (GOOD, ["evaluation.patience=3"], ["evaluation.patience", "data.eval"]),
        (GOOD, ["data.streaming=true"], ["data.streaming", "train.steps or train.tokens"]),
        (GOOD, ["data.train={path: rows.jsonl, format: sharegtp}"], ["sharegtp", "did you mean 'sharegpt'"]),
        (GOOD, ["model.chat_template=./none.jinja"], ["nothing at './none.jinja'"]),
        (GOOD, ["train.optimizer=adamw_schedule_free", "train.schedule=wsd"], ["averages the weights", "leave the rest out"]),
        (GOOD, ["adapter.rank=0", "train.seed=x", "trian.epochs=1"], ["adapter.rank", "train.seed", "did you mean 'train'"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_runs(run: Run, tmp_path: Path, file: str, overrides: list[str], words: list[str], as_json: bool) -> None:
    (tmp_path / "run.yaml").write_text(file)
    before = files(tmp_path)
    code, out, err = run("check", "run.yaml", *overrides, *(["--json"] if as_json else []))
    assert code == 2
    assert "Traceback" not in out + err and "pydantic" not in out + err
    assert files(tmp_path) == before
    if as_json:
        document = json.loads(out)
        assert err == "" and document["ok"] is False and document["resolved"] is None
        said = "\n".join("{file}:{line}: {key}: {message}".format(**fault) for fault in document["faults"])
    else:
        assert out == "" and err.startswith("error: ")
        said = err
    assert [word for word in words if word not in said] == []


def test_a_good_run_is_summed_up(run: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, out, err = run("check", "run.yaml", "train.steps=10", "data.eval=0.1", "output=out", "model.quantize=int8")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "run.yaml is valid. It would train:"
    assert "model org/model, quantised to int8" in lines
    assert "adapter lora, rank 16, alpha 32, on all linear layers" in lines
    assert "data rows.jsonl (format found in the rows); at most 2048 tokens, longer ones truncated" in lines
    assert "held out 0.1 of the rows" in lines
    assert "length 10 steps, 32 examples a step" in lines
    assert "output out" in lines
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["adapter=null", "train.learning_rate=1e-5"], "adapter none: full fine-tuning, every weight is trained"),
        (["adapter={path: org/saved}"], "adapter goes on from org/saved"),
        (["adapter={dora: true, rank: 4, targets: [q_proj, v_proj]}"], "adapter DoRA, rank 4, alpha 32, on q_proj, v_proj"),
        (["data.train={path: https://u:p@h/x.json, limit: 9}", "data.overlong=drop"],
         "data https://REDACTED@h/x.json (format found in the rows, at most 9 rows); at most 2048 tokens, longer ones dropped"),
        (["train.tokens=1.5B", "train.batch_tokens=65536"], "length 1,500,000,000 tokens, 65,536 tokens a step"),
        (["train.batch_size=1"], "length 1 epoch, 1 example a step"),
        (["model.revision=v2"], "model org/model at v2"),
        (["data.eval=[rows.jsonl]"], "held out rows.jsonl (format found in the rows)"),
    ],
)  # fmt: skip
def test_lines_of_the_summary(run: Run, overrides: list[str], line: str) -> None:
    _, out, _ = run("check", "run.yaml", *overrides)
    assert line in [" ".join(text.split()) for text in out.splitlines()]


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["adapter=null"], "train.learning_rate is 2e-4, the default, which suits an adapter"),
        (["model.trust_remote_code=true"], "model.trust_remote_code runs Python code"),
        (["data.eval=[rows.jsonl]"], "rows.jsonl is trained on and held out"),
        (["data.train=https://u:p@host/x.json"], "a URL holds a secret"),
        (
            ["output=old"],
            "old holds a run already: the same settings go on from its newest checkpoint, unless it is finished; others are refused",
        ),
        (["output=old", "resume=never"], "old holds a run already: this one is refused, as resume: never says"),
    ],
)
def test_notes(run: Run, tmp_path: Path, overrides: list[str], note: str) -> None:
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    code, out, _ = run("check", "run.yaml", *overrides)
    assert code == 0 and f"note: {note}" in out
    assert any(note in said for said in json.loads(run("check", "run.yaml", *overrides, "--json")[1])["notes"])
    assert "note:" not in run("check", "run.yaml")[1]


def test_a_missing_part_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.cli.parts.version", lambda package: None)
    _, out, _ = run("check", "run.yaml", "track=[csv, wandb]", "train.optimizer=paged_adamw")
    assert "note: track: [wandb] needs wandb: pip install 'burnish[wandb]'" in out
    assert "needs bitsandbytes: pip install 'burnish[quant]'" in out


def test_json_of_a_good_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_OUT", str(tmp_path))
    code, out, err = run("check", "run.yaml", "output=${BURNISH_OUT}/x", "--json")
    document = json.loads(out)
    assert (code, err, document["ok"], document["faults"]) == (0, "", True, [])
    assert document["resolved"]["output"] == "${BURNISH_OUT}/x"
    assert document["resolved"]["data"]["train"][0]["path"] == str(tmp_path / "rows.jsonl")


def test_faults_as_json_have_places(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD + "\ntrain:\n  sede: 1\n")
    faults = json.loads(run("check", "run.yaml", "--json")[1])["faults"]
    assert faults == [{"file": "run.yaml", "line": 6, "key": "train.sede", "message": "unknown key 'sede'; did you mean 'seed'?"}]


def test_schema_and_no_file(run: Run) -> None:
    code, out, _ = run("check", "--schema")
    assert code == 0 and json.loads(out)["title"] == "burnish run file"
    code, _, err = run("check")
    assert code == 2 and "needs a run file" in err


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "burnish", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD)
    missing = shell(tmp_path, "check", "run.yaml")
    assert missing.returncode == 2 and missing.stderr.startswith("error: run.yaml:3: data.train.0.path: nothing at 'rows.jsonl'")
    (tmp_path / "rows.jsonl").write_text("")
    good = shell(tmp_path, "check", "run.yaml")
    assert (good.returncode, good.stderr) == (0, "") and "is valid" in good.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "rows.jsonl"}


@pytest.mark.parametrize("arguments", [["--help"], ["check", "run.yaml"], ["recipes"], ["nonsense"]])
def test_light_commands_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(GOOD)
    (tmp_path / "rows.jsonl").write_text("")
    script = (
        "import sys; sys.argv[0] = 'burnish'\n"
        "from burnish.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'rich', 'peft', 'accelerate'} & set(sys.modules)\n"
        "print('heavy:', *sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "heavy:"


def test_what_happens_when_something_goes_wrong_is_shown(run: Run) -> None:
    code, said, _ = run(
        "check",
        "run.yaml",
        "save.every=10st",
        "recovery.spike=rollback",
        "parallel={strategy: hsdp, shards: 2, processes: 4}",
        "resume=force",
    )
    assert code == 0
    found = {line[2:13].strip(): line[13:] for line in said.splitlines() if line.startswith("  ")}
    assert found["saves"] == "every 10st; the newest 2 stay"
    assert found["recovery"] == "not finite: skip; spikes beyond 6 sigma: rollback; out of memory: halve"
    assert found["parallel"].startswith("hsdp, processes: 4, shards: 2, 0 restarts") and found["output"].endswith("resume: force")


def test_the_version(run: Run) -> None:
    code, said, _ = run("--version")
    assert code == 0 and said.startswith("burnish ") and said.split()[1][0].isdigit()


def test_ctrl_c_before_a_command_has_begun_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("burnish.cli.check.examine", interrupted)
    code, said, wrong = run("check", "run.yaml")
    assert code == 130 and said == "" and "Traceback" not in wrong


@pytest.mark.parametrize(
    ("overrides", "saves"),
    [
        (["save.every=null"], "no checkpoint before the end"),
        (["save={every: null, keep_every: 5st}"], "one every 5st for ever before the end"),
        (["save={every: null, keep_every: 5st}", "data.eval=0.1"], "the best by eval loss and one every 5st for ever before the end"),
    ],
)
def test_what_is_saved_without_every(run: Run, overrides: list[str], saves: str) -> None:
    _, said, _ = run("check", "run.yaml", "parallel.timeout=90s", *overrides)
    found = {line[2:13].strip(): line[13:] for line in said.splitlines() if line.startswith("  ")}
    assert found["saves"] == saves and found["parallel"].endswith("patience 90s")
