"""`burnish.load` inside TRL's SFTTrainer. Needs TRL, which `make peers-test` has in an environment of its own; skipped elsewhere."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import burnish
from burnish.models import fused
from burnish.models.policy import Policy

trl = pytest.importorskip("trl", reason="TRL is not installed here: `make peers-test` runs this where it is")

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def load(folder: Path, kernels: str) -> Policy:
    torch.manual_seed(0)  # the adapter's initial weights
    return burnish.load({"path": str(folder), "kernels": kernels}, adapter={"rank": 4}, precision="float32")


def train(policy: Policy, output: Path, **options: object) -> list[float]:
    """Three steps with TRL's own defaults wherever they are not about this machine; the loss of each."""
    from datasets import Dataset

    rows = [{"prompt": f"the user asks {'again ' * n}", "completion": f"the assistant answers {n} times"} for n in range(6)]
    arguments = trl.SFTConfig(
        str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    trainer = trl.SFTTrainer(model=policy.model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=policy.tokenizer)
    assert trainer.model is policy.model
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "keeping"])
def test_sft_trainer_takes_the_fast_model_and_computes_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    fast, plain = load(tiny_model, "auto"), load(tiny_model, "off")
    slots = fast.kernels.slots
    assert slots.keys() >= {"norm", "attention", "mlp"} and all(slot.replaced == slot.found > 0 for slot in slots.values()), fast.kernels
    assert not plain.kernels.slots
    before = {name: weight.detach().clone() for name, weight in fast.trainable().items()}

    calls: list[int] = []
    monkeypatch.setattr(fused, "lora_mlp", lambda *args, original=fused.lora_mlp: calls.append(1) or original(*args))
    found = train(fast, tmp_path / "fast", gradient_checkpointing=checkpointing)
    seen = len(calls)
    expected = train(plain, tmp_path / "plain", gradient_checkpointing=checkpointing)

    assert seen == len(calls) == STEPS * fast.model.config.num_hidden_layers * (2 if checkpointing else 1)
    assert len(found) == STEPS and all(map(math.isfinite, found))
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)
    for name, weight in fast.trainable().items():
        assert not torch.equal(weight, before[name]), name
        torch.testing.assert_close(weight, plain.trainable()[name], rtol=1e-2, atol=1e-3)


def test_the_block_of_the_python_page_runs(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (block,) = re.findall(r"^```python peer=trl\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/trl/adapter/adapter_model.safetensors").is_file()


def test_what_was_trained_in_it_is_saved_for_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    policy = load(tiny_model, "auto")
    train(policy, tmp_path / "run")
    policy.model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(policy.model.eval()(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)
