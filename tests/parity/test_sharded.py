"""Several processes are one: the same loss curve and the same weights under every strategy, and across resumes with other numbers of them.

All cases of one number of processes share a launch, because starting is most of what a tiny run costs. The full table is `slow`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from . import ranks

ROWS = Path(__file__).parents[2] / "recipes" / "data"
LORA = {"rank": 4, "alpha": 8}
PREFERENCES = {"train": {"path": str(ROWS / "preferences.jsonl"), "limit": 20}, "eval": 0.25, "max_length": 256}
CONVERSATIONS = {"train": {"path": str(ROWS / "service_desk.jsonl"), "limit": 25}, "eval": 0.2, "max_length": 256}
SPREAD = ["full", "plain", "kto"]
ZERO = ["full", "dpo", "kto"]
TENSOR = ["full", "lora", "dpo", "kto", "distill", "reward"]
CUT = 5e-6
"""Where sums over tokens or features are cut, too: in float32 that moves by its last digits what is learnt from differences of long sums,
and what Adam makes of gradients near zero. test_context.py and test_tensor.py have the same in float64."""
STEPS = 5
Settings = dict[str, Any]
Launch = Callable[[int, list[dict[str, Any]]], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def untied(tiny_model: Path, place: Path) -> Path:
    """A Qwen3 whose head is a weight of its own."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tied = AutoConfig.from_pretrained(tiny_model)
    torch.manual_seed(1)
    sizes: Settings = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    config = Qwen3Config(
        vocab_size=tied.vocab_size, num_hidden_layers=3, tie_word_embeddings=False, eos_token_id=tied.eos_token_id, **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(place / "untied")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(place / "untied")
    return place / "untied"


@pytest.fixture(scope="module")
def launch(place: Path) -> Launch:
    """Trains cases in so many processes."""

    def launched(processes: int, cases: list[dict[str, Any]]) -> None:
        file = place / f"cases-{processes}.json"
        file.write_text(json.dumps(cases))
        root = Path(__file__).parents[2]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "tests.parity.ranks",
        ]
        done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]

    return launched


def run_of(place: Path, model: Path, name: str, /, **sections: Any) -> Settings:
    """Steps of several micro-batches, of unequal token counts and of an odd number of examples."""
    objective = sections.get("objective", {"kind": "sft"})
    settings: Settings = {
        "model": str(model),
        "data": CONVERSATIONS if objective["kind"] in ("sft", "distill") else PREFERENCES,
        "evaluation": {"every": "3st"},
        "save": {"every": None, "best": False},
        "output": str(place / name),
    } | {key: value for key, value in sections.items() if key not in ("train", "data")}
    settings["data"] = settings["data"] | {"cache": str(place / "cache"), "workers": 1} | sections.get("data", {})
    train = {"steps": STEPS, "batch_size": 5, "micro_batch_tokens": 300, "learning_rate": 1e-4, "precision": "float32"}
    train |= sections.get("train", {})
    return settings | {"train": {key: value for key, value in train.items() if value is not None}}


def shared(strategy: str, settings: Settings, name: str, **parallel: Any) -> Settings:
    """The same run on several processes."""
    output = str(Path(settings["output"]).with_name(name))
    return settings | {"parallel": {"strategy": strategy, **parallel}, "output": output}


def curve(settings: Settings) -> list[dict[str, float]]:
    keys = ("step", "loss", "grad_norm", "trained_tokens", "eval_loss")
    lines = [
        json.loads(line) for name in ("metrics", "eval") for line in Path(settings["output"], f"{name}.jsonl").read_text().splitlines()
    ]
    return [{key: line[key] for key in keys if key in line} for line in lines]


def weights(settings: Settings) -> dict[str, torch.Tensor]:
    return {name: value for file in (Path(settings["output"]) / "model").glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(one: Settings, other: Settings, within: float = 1e-6) -> None:
    mine, theirs = curve(one), curve(other)
    assert len(mine) == len(theirs) == STEPS + 2
    for line, beside in zip(mine, theirs, strict=True):
        assert line.keys() == beside.keys()
        assert all(math.isclose(line[key], beside[key], rel_tol=within, abs_tol=within) for key in line), (line, beside)
    ours, found = weights(one), weights(other)
    assert ours.keys() == found.keys()
    for name, value in ours.items():
        assert (value - found[name]).abs().max() <= within, name


def moved(settings: Settings, model: Path) -> bool:
    """Whether training did something that could differ."""
    before = load_file(model / "model.safetensors")
    after = weights(settings)
    return any("lora_B" in name and bool(value.any()) for name, value in after.items()) or any(
        (value - before[name]).abs().max() > 1e-5 for name, value in after.items() if name in before
    )


@pytest.fixture(scope="module")
def short(place: Path, tiny_model: Path, untied: Path, launch: Launch) -> dict[str, Settings]:
    """A few cases on one process, on two and on four, and one run that goes on from two to one to four."""
    teacher = str(untied)
    runs = {
        "full": run_of(place, tiny_model, "full"),
        "lora": run_of(place, tiny_model, "lora", adapter=LORA, train={"learning_rate": 1e-3, "micro_batch_tokens": 160}),
        "dpo": run_of(place, tiny_model, "dpo", objective={"kind": "dpo", "reference": "copy"}),
        "pairs": run_of(place, tiny_model, "pairs", objective={"kind": "dpo"}, adapter=LORA),
        "kto": run_of(place, tiny_model, "kto", objective={"kind": "kto"}, adapter=LORA),
        "distill": run_of(place, untied, "distill", objective={"kind": "distill", "teacher": teacher, "sft_weight": 0.5}),
        "reward": run_of(place, tiny_model, "reward", objective={"kind": "reward"}),
    }
    # Where one process reads the weights, fast modules are not used: at this rate their rounding would show.
    runs["plain"] = runs["lora"] | {"model": {"path": str(tiny_model), "kernels": "off"}, "output": str(place / "plain")}
    for settings in runs.values():
        ranks.train({"settings": settings})
    for name in ("full", "lora", "dpo", "kto", "distill"):
        runs[f"{name}-fsdp2"] = shared("fsdp", runs[name], f"{name}-fsdp2")
    runs["chain"] = runs["full"] | {"output": str(place / "chain"), "save": {"every": "1st", "best": False}}
    runs["again"] = shared("fsdp", runs["chain"], "again")
    runs["broken"] = shared("fsdp", runs["chain"], "broken")
    two = []
    for name in ZERO:
        runs[f"{name}-zero2"] = shared("zero2", runs[name], f"{name}-zero2")
        runs[f"{name}-zero1"] = shared("zero1", runs[name], f"{name}-zero1")
    for name in SPREAD:
        runs[f"{name}-spread2"] = shared("fsdp", runs[name], f"{name}-spread2", offload=True)
        two.append({"settings": runs[f"{name}-spread2"], "spread": True})
    for name in ("full", "pairs", "kto", "distill", "reward"):
        runs[f"{name}-context2"] = shared("ddp", runs[name], f"{name}-context2", context=2)
    for name in TENSOR:
        runs[f"{name}-tensor2"] = shared("ddp", runs[name], f"{name}-tensor2", tensor=2)
    runs["swap"] = runs["full"] | {"output": str(place / "swap"), "save": {"every": "1st", "best": False}}
    runs["repeat"] = shared("ddp", runs["swap"], "repeat", tensor=2)
    runs["hop"] = runs["full"] | {"output": str(place / "hop"), "save": {"every": "1st", "best": False}}
    two += [
        {"settings": settings} for name, settings in runs.items() if name.endswith(("-fsdp2", "-context2", "-tensor2", "-zero1", "-zero2"))
    ]
    two.append({"settings": shared("ddp", runs["hop"], "hop", context=2), "stop": 2})
    two += [{"settings": runs[name], **stop} for name in ("again", "repeat") for stop in ({"stop": 3}, {})]
    runs["copies"] = shared("ddp", runs["swap"], "copies")
    runs["copies-broken"] = shared("ddp", runs["swap"], "copies-broken")
    two += [{"settings": runs["copies"], "together": True, "stop": 3}, {"settings": runs["copies"], "together": True}]
    two.append({"settings": runs["copies-broken"], "together": True, "broken": 1})
    swaps = [("ddp", {"tensor": 2}), ("fsdp", {}), ("ddp", {"tensor": 2})]
    two += [{"settings": shared(way, runs["swap"], "swap", **options), "stop": n + 1} for n, (way, options) in enumerate(swaps)]
    two += [{"settings": shared("fsdp", runs["chain"], "chain"), "stop": 2}, {"settings": runs["broken"], "broken": 1}]
    launch(2, two)
    ranks.train({"settings": runs["chain"], "stop": 4})
    ranks.train({"settings": runs["hop"]})
    for name in ("full", "lora"):
        runs[f"{name}-hsdp4"] = shared("hsdp", runs[name], f"{name}-hsdp4", shards=2)
    runs["pairs-context4"] = shared("ddp", runs["pairs"], "pairs-context4", context=2)
    runs["full-context4"] = shared("fsdp", runs["full"], "full-context4", context=2)
    for name in ("full", "lora"):
        runs[f"{name}-tensor4"] = shared("ddp", runs[name], f"{name}-tensor4", tensor=2)
    four = [{"settings": settings} for name, settings in runs.items() if name.endswith(("-hsdp4", "-context4", "-tensor4"))]
    four.append({"settings": shared("ddp", runs["swap"], "swap", tensor=2), "stop": 4})
    launch(4, [*four, {"settings": shared("fsdp", runs["chain"], "chain")}])
    ranks.train({"settings": runs["swap"]})
    return runs


@pytest.mark.parametrize("name", ["full", "lora", "dpo", "kto", "distill"])
def test_two_processes_with_shards_are_one(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-fsdp2"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ZERO)
def test_each_stage_of_zero_is_one_process(short: dict[str, Settings], name: str, stage: int) -> None:
    assert_same(short[name], short[f"{name}-zero{stage}"])


@pytest.mark.parametrize("name", SPREAD)
def test_weights_that_one_process_has_read_are_everyones(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-spread2"])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_groups_of_two_are_one(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-hsdp4"])


@pytest.mark.parametrize("name", ["full", "pairs", "kto", "distill", "reward"])
def test_two_processes_that_share_tokens_are_one(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-context2"])


@pytest.mark.parametrize("name", ["full", "pairs"])
def test_two_pairs_that_share_tokens_are_one(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-context4"])


def test_a_run_with_shared_tokens_goes_on_alone(short: dict[str, Settings]) -> None:
    assert_same(short["full"], short["hop"])


@pytest.mark.parametrize("name", TENSOR)
def test_two_processes_that_share_layers_are_one(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-tensor2"], CUT)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_pairs_that_share_layers_are_one(short: dict[str, Settings], name: str) -> None:
    assert_same(short[name], short[f"{name}-tensor4"], CUT)


def test_from_shared_layers_to_shards_and_back_is_uninterrupted(short: dict[str, Settings]) -> None:
    assert_same(short["full"], short["swap"])


def test_the_cases_could_differ(short: dict[str, Settings], tiny_model: Path, untied: Path) -> None:
    trained = [settings for name, settings in short.items() if not name.endswith("broken")]
    assert all(moved(settings, untied if "untied" in str(settings["model"]) else tiny_model) for settings in trained)


def test_from_two_processes_to_one_to_four_is_uninterrupted(short: dict[str, Settings]) -> None:
    assert_same(short["full"], short["chain"])
    folder = Path(short["chain"]["output"]) / "checkpoints" / f"step-{STEPS:06d}"
    assert len(list(folder.glob("model-*-of-00004.safetensors"))) == 4


@pytest.mark.parametrize(("name", "way"), [("again", "fsdp2"), ("repeat", "tensor2")])
def test_resumed_on_as_many_processes_is_bit_equal(short: dict[str, Settings], name: str, way: str) -> None:
    assert curve(short[name]) == curve(short[f"full-{way}"])
    found = weights(short[name])
    assert all(torch.equal(value, found[name]) for name, value in weights(short[f"full-{way}"]).items())


def test_ranks_that_hold_everything_write_together_and_go_on(short: dict[str, Settings]) -> None:
    assert_same(short["full"], short["copies"])
    folder = Path(short["copies"]["output"]) / "checkpoints" / f"step-{STEPS:06d}"
    sizes = [sum(file.stat().st_size for file in folder.glob(f"*-0000{rank}-of-00002.safetensors")) for rank in (1, 2)]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("name", ["broken", "copies-broken"])
def test_a_rank_that_cannot_write_is_heard_of_on_all(short: dict[str, Settings], name: str) -> None:
    output = Path(short[name]["output"])
    for rank in range(2):
        heard = (output / f"heard-{rank}").read_text()
        assert f"step-{STEPS:06d} could not be written: rank 1: [Errno 28] No space left on device" in heard
    assert [folder.name for folder in (output / "checkpoints").iterdir()] == ["step-000001"]


OBJECTIVES: dict[str, Settings] = {
    "sft": {},
    "dpo": {"kind": "dpo"},
    "dpo-copy": {"kind": "dpo", "reference": "copy"},
    "dpo-moving": {"kind": "dpo", "sync": {"every": "2st", "mix": 1.0}},
    "aot": {"kind": "dpo", "loss": ["aot"]},
    "kto": {"kind": "kto"},
    "simpo": {"kind": "simpo"},
    "cpo": {"kind": "cpo"},
    "orpo": {"kind": "orpo"},
    "reward": {"kind": "reward"},
    "distill": {"kind": "distill", "sft_weight": 0.5},  # the teacher is the student before training
}
WAYS: list[tuple[int, str, Settings]] = [
    (2, "ddp", {}),
    (2, "fsdp", {}),
    (4, "fsdp", {}),
    (4, "hsdp", {"shards": 2}),
    (2, "zero1", {}),
    (4, "zero2", {}),
    (2, "ddp", {"context": 2}),
    (4, "ddp", {"context": 2}),
    (4, "fsdp", {"context": 2}),
    (4, "hsdp", {"shards": 2, "context": 2}),
    (2, "ddp", {"tensor": 2}),
    (4, "ddp", {"tensor": 2}),
]


def way_of(name: str, processes: int, strategy: str, options: Settings) -> str:
    """What a run is called."""
    groups = [f"-{key}{options[key]}" for key in ("context", "tensor") if key in options]
    return "".join((name, "-", strategy, str(processes), *groups))


def goes(name: str, options: Settings) -> bool:
    """Whether a run is one that can be shared so."""
    return "tensor" not in options or name != "dora"


@pytest.mark.slow
def test_every_objective_under_every_strategy(place: Path, tiny_model: Path, untied: Path, launch: Launch) -> None:
    runs: dict[str, Settings] = {}
    for name, objective in OBJECTIVES.items():
        chosen = {"objective": objective | ({"teacher": str(tiny_model)} if name == "distill" else {})} if objective else {}
        runs[f"{name}-whole"] = run_of(place, tiny_model, f"all-{name}-whole", **chosen)
        runs[f"{name}-lora"] = run_of(place, tiny_model, f"all-{name}-lora", adapter=LORA, train={"learning_rate": 3e-4}, **chosen)
    stacked = {"optimizer": {"kind": "lion"}, "checkpoint_activations": "on"}
    runs["lion"] = run_of(place, untied, "all-lion", train=stacked)
    runs["sgd"] = run_of(place, untied, "all-sgd", train={"optimizer": {"kind": "sgd"}, "mlp_tile": 50, "learning_rate": 0.05})
    runs["schedule-free"] = run_of(place, untied, "all-free", train={"optimizer": {"kind": "adamw_schedule_free"}}, save={"every": "2st"})
    runs["alone"] = run_of(place, untied, "all-alone", data={"packing": "off"})
    runs["bins"] = run_of(place, tiny_model, "all-bins", train={"batch_size": None, "batch_tokens": 700})
    runs["tokens"] = run_of(place, untied, "all-tokens", model={"path": str(untied), "new_tokens": ["<a>", "<b>"]}, adapter=LORA)
    runs["saved"] = run_of(place, untied, "all-saved", adapter=LORA | {"save_modules": ["lm_head"]})
    runs["dora"] = run_of(place, tiny_model, "all-dora", adapter=LORA | {"dora": True})
    for settings in runs.values():
        ranks.train({"settings": settings})
    for processes, strategy, options in WAYS:
        going = [name for name in runs if goes(name, options)]
        cases = [shared(strategy, runs[name], way_of(name, processes, strategy, options), **options) for name in going]
        launch(processes, [{"settings": settings} for settings in cases])
    kept = {"reshard": False}, {"offload": True}
    launch(2, [{"settings": shared("fsdp", runs["sft-whole"], f"kept-{n}", **options)} for n, options in enumerate(kept)])
    spread = [name for name in runs if name.endswith("-whole") or name in ("tokens", "saved", "dora", "schedule-free")]
    cases = [shared("hsdp", runs[name], f"{name}-spread4", shards=2, offload=True) for name in spread]
    # A teacher is read by all.
    launch(4, [{"settings": settings, "spread": name != "distill-whole"} for name, settings in zip(spread, cases, strict=True)])
    for name, settings in zip(spread, cases, strict=True):
        assert_same(runs[name], settings, within=3e-6)  # the model's own modules, which round in another way than the fast ones
    for name, run in runs.items():
        for processes, strategy, options in WAYS:
            if goes(name, options):
                within = CUT if "context" in options or "tensor" in options else 1e-6
                assert_same(run, shared(strategy, run, way_of(name, processes, strategy, options)), within)
    for n in range(len(kept)):
        assert_same(runs["sft-whole"], shared("fsdp", runs["sft-whole"], f"kept-{n}"))


def counted(processes: int, *options: str) -> list[str]:
    """The rows that benchmarks/communication.py prints."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.communication", "--micro-batches", "2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("whole model", "LoRA"))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_exchanged_is_what_arithmetic_says(processes: int) -> None:
    rows = counted(processes, "--context", str(processes), "--tokens", "512")
    assert len(rows) == 4
    assert all(row.endswith("| equal") for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_added_up_is_what_arithmetic_says(processes: int) -> None:
    rows = counted(processes, "--tensor", "2", "--tokens", "512")
    assert len(rows) == 2
    assert all(row.endswith("| equal") for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_sent_is_what_arithmetic_says(processes: int) -> None:
    rows = counted(processes)
    assert len(rows) == (12 if processes == 4 else 10)
    assert all(row.endswith("| equal") for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LORA])
def test_any_strategy_goes_on_from_any_other(place: Path, untied: Path, launch: Launch, adapter: Settings | None) -> None:
    name = "hopping-lora" if adapter else "hopping"
    whole = run_of(place, untied, f"{name}-whole", adapter=adapter)
    ranks.train({"settings": whole})
    hopping = whole | {"output": str(place / name), "save": {"every": "1st", "best": False}}
    launch(2, [{"settings": shared("ddp", hopping, name), "stop": 1}, {"settings": shared("fsdp", hopping, name), "stop": 2}])
    launch(4, [{"settings": shared("hsdp", hopping, name, shards=2), "stop": 3}])
    launch(2, [{"settings": shared("ddp", hopping, name), "stop": 4}])
    shutil.rmtree(place / name / "model", ignore_errors=True)
    launch(3, [{"settings": shared("fsdp", hopping, name)}])
    assert_same(whole, hopping)
