"""The checks across keys: each contradiction has its sentence, and no sensible run is refused."""

# ruff: noqa: E501  # a table with a case a line reads best
from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.config import checks as module
from burnish.config.check import Check
from burnish.config.checks import CHECKS, sources
from burnish.config.load import LoadedRun
from burnish.config.run import EXCLUSIVE, RunConfig

Load = Callable[..., LoadedRun]
Message = Callable[..., str]


@pytest.mark.parametrize(
    ("check", "overrides", "said"),
    [
        ("one_length", ["train.steps=5", "train.tokens=1M"], "command line: train.steps: steps and tokens of train exclude each other; give one of them"),
        ("one_batch_size", ["train.batch_size=4", "train.batch_tokens=4096"], "command line: train.batch_tokens: batch_size and batch_tokens of train exclude each other; give one of them"),
        ("longest_example_fits", ["train.batch_tokens=1024"], "command line: train.batch_tokens is 1024, which does not hold one example of data.max_length = 2048 tokens"),
        ("quantized_needs_adapter", ["model.quantize=nf4"], "command line: model.quantize: nf4 freezes the base weights, so it needs an adapter to train, e.g. adapter: lora"),
        ("init_needs_full_weights", ["model.quantize=nf4", "adapter.init=pissa"], "command line: adapter.init: pissa decomposes the base weights, which model.quantize: nf4 does not keep"),
        ("saved_adapter_keeps_its_shape", ["adapter={path: org/saved, rank: 8, targets: mlp}"], "command line: adapter.path goes on from a saved adapter, which brings its own rank and targets; leave them out"),
        ("lora_plus_needs_adapter", ["train.lora_plus_ratio=16"], "command line: train.lora_plus_ratio sets the rate of an adapter's matrices, but there is no adapter"),
        ("fp8_is_read_by_nobody_else", ["model.quantize=fp8", "adapter.dora=true"], "adapter.dora reads the base weights, which model.quantize: fp8 does not let it"),
        ("fp8_is_read_by_nobody_else", ["model.quantize=fp8", "adapter.init=olora"], "adapter.init: olora reads the base weights"),
        ("update_in_backward_knows_no_norm", ["train.optimizer={in_backward: true}"], "before the norm of all gradients is known; write train.clip: null"),
        ("update_in_backward_knows_no_overflow", ["train.optimizer={in_backward: true}", "train.clip=null", "train.precision=float16"], "before float16 gradients are searched for overflow; take another train.precision"),
        ("offloading_recomputes", ["train.offload_activations=true", "train.checkpoint_activations=off"], "needs train.checkpoint_activations: on"),
        ("stream_needs_length", ["data.streaming=true"], "command line: data.streaming does not know how long an epoch is; give train.steps or train.tokens instead of epochs"),
        ("one_process_is_one", ["parallel.processes=2", "parallel.strategy=none"], "command line: parallel.processes: parallel.strategy: none means one process, parallel.processes is 2; leave one of them out"),
        ("restarts_go_on", ["parallel.restarts=1", "resume=never"], "command line: parallel.restarts goes on from the last checkpoint, which resume: never refuses; leave one of them out"),
        ("groups_share_out_the_processes", ["parallel={strategy: hsdp, shards: 3, processes: 4}"], "parallel.processes: 4 cannot be cut into groups of parallel.shards: 3; take a divisor"),
        ("going_back_needs_a_checkpoint", ["recovery.spike=rollback", "save.every=null"], "recovery.spike.action: rollback goes back to the newest checkpoint, and save.every: null writes none"),
        ("going_back_needs_a_checkpoint", ["recovery.non_finite=rollback", "save.every=null"], "recovery.non_finite: rollback goes back to the newest checkpoint"),
        ("stream_cannot_be_split", ["data.streaming=true", "train.steps=5", "data.eval=0.1"], "command line: data.eval: 0.1 is a share of rows that data.streaming cannot count; name a data set for it"),
        ("share_holds_a_row", ["data.train={path: rows.jsonl, limit: 9}", "data.eval=0.05"], "command line: data.eval: 0.05 of at most 9 rows holds out none"),
        ("sample_needs_limit", ["data.train.sample=true"], "needs limit, the number of rows to take"),
        ("patience_needs_evaluation", ["evaluation.patience=2"], "command line: evaluation.patience stops early by the eval loss, so it needs data.eval"),
        ("patience_needs_evaluation", ["evaluation={patience: 2, every: null}", "data.eval=0.1"], "command line: evaluation.patience counts evaluations, but evaluation.every: null makes none"),
        ("optimizer_uses_its_keys", ["train.optimizer={kind: sgd, betas: [0.9, 0.99], eps: 1e-6}"], "command line: train.optimizer: the optimizer sgd has no betas and eps; leave them out"),
        ("schedule_uses_its_keys", ["train.schedule={kind: linear, power: 2}"], "command line: train.schedule: the schedule linear has no power; leave it out"),
        ("schedule_uses_its_keys", ["train.schedule={kind: constant, floor: 0.1}"], "the schedule constant has no floor; leave it out"),
        ("schedule_free_has_no_curve", ["train.optimizer=adamw_schedule_free", "train.schedule=linear"], "command line: train.schedule: adamw_schedule_free averages the weights instead of lowering the rate; of train.schedule it takes the warmup alone, leave the rest out"),
        ("schedule_free_has_no_curve", ["train.optimizer=adamw_schedule_free", "train.schedule={kind: cosine, floor: 0.1}"], "it takes the warmup alone, leave the rest out"),
        ("strategy_uses_its_keys", ["parallel={strategy: fsdp, shards: 4}"], "command line: parallel.shards: parallel.strategy: fsdp has no shards; leave it out"),
        ("strategy_uses_its_keys", ["parallel={strategy: ddp, offload: true, reshard: false}"], "parallel.strategy: ddp has no reshard and offload; leave them out"),
        ("strategy_uses_its_keys", ["parallel={strategy: zero1, reshard: false}"], "parallel.strategy: zero1 has no reshard; leave it out"),
        ("shards_can_be_trained", ["parallel=zero2", "train.compile=auto"], "parallel.strategy: zero2 cuts weights into shards, and train.compile is not tried there"),
        ("measuring_is_not_deterministic", ["train.deterministic=true", "train.compile=auto"], "which train.deterministic cannot repeat; leave one out"),
        ("shards_can_be_trained", ["parallel=fsdp", "train.optimizer=muon"], "cuts weights into shards, and train.optimizer: muon looks at more than single elements; take one of adamw, lion, sgd"),
        ("shards_can_be_trained", ["parallel=hsdp", "train.optimizer={in_backward: true}", "train.clip=null"], "updates weights before their gradients have met; set it to false"),
        ("shards_can_be_trained", ["parallel=fsdp", "train.compile=auto"], "train.compile is not tried there; leave it out"),
        ("shards_can_be_trained", ["parallel=fsdp", "train.offload_activations=true"], "train.offload_activations does not know them; leave it out"),
        ("groups_divide_processes", ["parallel={context: 3, processes: 4}"], "command line: parallel.context: 3 does not divide parallel.processes: 4; take one of 2, 4"),
        ("groups_divide_processes", ["parallel={tensor: 3, processes: 4}"], "command line: parallel.tensor: 3 does not divide parallel.processes: 4; take one of 2, 4"),
        ("layers_can_be_shared", ["parallel={tensor: 2, strategy: fsdp}"], "parallel.tensor: 2 shares the weights of each layer, and goes with strategy: ddp only, found fsdp; take ddp, or leave parallel.tensor out"),
        ("layers_can_be_shared", ["parallel={tensor: 2, context: 2}"], "and parallel.context the tokens of each example; leave one of them out"),
        ("layers_can_be_shared", ["parallel.tensor=2", "model.quantize=nf4", "adapter={}"], "and model.quantize: nf4 stores them in blocks that are not cut; leave one of them out"),
        ("layers_can_be_shared", ["parallel.tensor=2", "adapter.dora=true"], "and adapter.dora needs the lengths of whole columns; leave one of them out"),
        ("layers_can_be_shared", ["parallel.tensor=2", "adapter.dropout=0.1"], "and adapter.dropout would differ from that on one device; leave one of them out"),
        ("layers_can_be_shared", ["parallel.tensor=2", "adapter.init=olora"], "and adapter.init: olora takes a part out of whole weights; take another one"),
        ("layers_can_be_shared", ["parallel.tensor=2", "train.optimizer=muon"], "and train.optimizer: muon looks at more than single elements; take one of adamw, lion, sgd"),
        ("tokens_can_be_shared", ["parallel={context: 2, strategy: none}"], "parallel.strategy: none means one process, and parallel.context shares examples between several; leave one of them out"),
        ("tokens_can_be_shared", ["parallel.context=2", "train.compile=auto"], "parallel.context exchanges tokens within layers, where train.compile is not tried; leave train.compile out"),
        ("shards_can_be_trained", ["parallel=fsdp", "adapter={init: pissa}"], "adapter.init: pissa takes a part out of whole weights; take another one"),
        ("rates_say_something", ["train.rates=[{match: lm_head}]"], "command line: train.rates: the group 'lm_head' of train.rates sets neither learning_rate nor weight_decay"),
        ("output_is_its_own", ["model=./model", "output=model"], "command line: output is also the model; a run needs a folder of its own"),
    ],
)  # fmt: skip
def test_contradictions(fault: Message, folder: Path, check: str, overrides: list[str], said: str) -> None:
    (folder / "model").mkdir()
    message = fault("", *overrides)
    assert message == said or (said in message and len(message.splitlines()) == 1)
    assert getattr(module, check) in CHECKS


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.quantize=nf4", "adapter=lora"],
        ["model.quantize=nf4", "adapter={dora: true, rslora: true, init: olora}"],
        ["adapter={path: org/saved, dropout: 0.1}"],
        ["train.batch_tokens=2048"],
        ["data.streaming=true", "train.tokens=1B", "data.eval=rows.jsonl"],
        ["evaluation.patience=2", "data.eval=0.1"],
        ["train.optimizer={kind: muon, momentum: 0.95, betas: [0.9, 0.95], eps: 1e-10}"],
        ["train.optimizer={kind: sgd, momentum: 0.0}"],
        ["train.schedule={kind: wsd, decay: 0.1, floor: 0.1}"],
        ["train.schedule={kind: polynomial, power: 2}"],
        ["data.train={path: rows.jsonl, limit: 5, sample: true}"],
        ["data.train={path: rows.jsonl, limit: 10}", "data.eval=0.05"],
        ["train.optimizer=adamw_schedule_free"],
        ["train.optimizer={in_backward: true}", "train.clip=null"],
        ["train.offload_activations=true"],
        ["model.quantize=fp8", "adapter=lora"],
        ["train.optimizer=adamw_schedule_free", "train.schedule={kind: constant, warmup: 0.1}"],
        ["parallel={strategy: hsdp, shards: 8, offload: true}", "train.optimizer=lion"],
        ["parallel={reshard: false}", "train.optimizer=muon"],
        ["parallel={strategy: fsdp, context: 4, processes: 8}", "train.mlp_tile=256"],
        ["parallel.context=2", "train.offload_activations=true", "train.optimizer=muon"],
        ["recovery.spike=rollback", "save={every: null, keep_every: 100st}"],
        ["recovery.non_finite=rollback", "save.every=null", "data.eval=0.1"],  # the best one is saved
    ],
)
def test_sensible_runs_pass(load: Load, overrides: list[str]) -> None:
    assert isinstance(load("", *overrides).config, RunConfig)


def test_no_check_is_forgotten() -> None:
    assert [check for _, check in inspect.getmembers(module, lambda member: isinstance(member, Check))] != []
    assert {id(check) for _, check in inspect.getmembers(module) if isinstance(check, Check)} == {id(check) for check in CHECKS}


def test_checks_speak_of_keys_that_exist() -> None:
    from burnish.config.shape import keys_below

    known = set(keys_below(RunConfig))
    assert {key for check in CHECKS for key in check.keys} <= known
    assert {f"{section}.{key}" for section, groups in EXCLUSIVE.items() for group in groups for key in group} <= known


def test_all_sources(load: Load) -> None:
    config = load("", "data.eval=[rows.jsonl]").config
    assert len(sources(config.data)) == 2 and len(sources(load().config.data)) == 1


@pytest.mark.parametrize(("written", "meant"), [("true", "auto"), ("on", "auto"), ("false", "off"), ("off", "off"), ("auto", "auto")])
def test_what_is_automatic_can_be_switched_on_and_off(load: Load, written: str, meant: str) -> None:
    config = load("", f"model.kernels={written}", f"train.compile={written}").config
    assert (config.model.kernels, config.train.compile) == (meant, meant)
