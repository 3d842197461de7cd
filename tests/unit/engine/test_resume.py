"""Whether a checkpoint belongs to a run."""

from burnish.config.run import RunConfig
from burnish.engine.resume import identity_of


def config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": {"train": ["a.json"]}, **changes})


def test_what_decides_the_result_is_part_of_the_identity():
    assert identity_of(config()) == identity_of(config())
    for change in (
        {"model": "other"},
        {"data": {"train": ["b.json"]}},
        {"data": {"train": ["a.json"], "max_length": 7}},
        {"objective": {"kind": "sft", "z_loss": 0.1}},
        {"adapter": {"kind": "lora"}},
        {"train": {"seed": 1}},
        {"train": {"optimizer": "lion"}},
        {"train": {"precision": "float32"}},
    ):
        assert identity_of(config(**change)) != identity_of(config()), change


def test_what_does_not_may_change():
    for change in (
        {"output": "elsewhere"},
        {"save": {"every": "1st", "keep": 5}},
        {"evaluation": {"every": "1st"}},
        {"track": ["tensorboard"]},
        {"train": {"steps": 9, "micro_batch_tokens": 512, "checkpoint_activations": "on"}},
        {"data": {"train": ["a.json"], "workers": 3}},
    ):
        assert identity_of(config(**change)) == identity_of(config()), change


def test_null_is_the_same_as_left_out():
    assert identity_of(config(model={"path": "m", "revision": None})) == identity_of(config())


def test_only_plain_values():
    assert identity_of(config())["train.schedule.kind"] == "cosine"
