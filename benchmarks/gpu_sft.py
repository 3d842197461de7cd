"""A training step on a GPU: random weights in the shapes of Llama 3, packed rows, burnish beside what else is installed.

    python -m benchmarks.gpu_sft                                       1B, 3B, 8B; LoRA and full; every variant that is there
    python -m benchmarks.gpu_sft --sizes 1b --modes lora --variants burnish,plain --json gpu.json
    python -m benchmarks.gpu_sft --tiny                                two small layers on a CPU, to see that all of it runs

burnish        Policy and its kernels, flat batches
plain          transformers with PEFT, its own sdpa attention and loss, rows of equal length
liger          plain, with Liger's kernels
trl            SFTTrainer's step (stock settings but for checkpointing), timed between optimiser steps
trl-liger      the same with Liger's kernels, the fastest that TRL has
unsloth        FastLanguageModel, gradient checkpointing off
unsloth-stock  the same with checkpointing "unsloth", as its examples have it

Every micro-step has 8 rows of 2048 tokens, each one document, every token trained, so that all variants do the same work. Each variant has
a process of its own; all load at once, and then they take turns. Where memory does not suffice a task is tried again with activation
checkpointing, and the line says so. MFU counts useful FLOPs only (benchmarks/roofline.py) and refers to the card's 989 TFLOP/s; peak memory
is what torch has allocated.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_card import Card, profile
from benchmarks.roofline import CARDS, SHAPES, useful_flops

ROOT = Path(__file__).resolve().parents[1]
NEEDS: dict[str, tuple[str, ...]] = {
    "burnish": (),
    "plain": (),
    "liger": ("liger_kernel",),
    "trl": ("trl",),
    "trl-liger": ("trl", "liger_kernel"),
    "unsloth": ("unsloth",),
    "unsloth-stock": ("unsloth",),
}
"""The variants, and the packages that each needs."""
ANSWER = "answer: "
"""What a process's lines begin with that are meant for us; libraries print others."""

Step = Callable[[], "float | torch.Tensor"]
"""Forward, backward and update of one micro-step; returns the mean loss."""


@dataclass(frozen=True)
class Task:
    """What one process does."""

    variant: str
    size: str
    mode: str  # "lora" or "full"
    rows: int
    length: int
    steps: int
    warmup: int
    checkpoint: bool = False
    profile: str = ""  # a folder

    @property
    def shape(self) -> dict[str, Any]:
        """As a LlamaConfig takes it."""
        shape = SHAPES[self.size]
        return {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "tie_word_embeddings": shape.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> int:
    options = parse()
    if options.child:
        return serve(options.child)
    lines: list[dict[str, Any]] = []
    print(f"{'':26}{'tokens/s':>10}{'min':>9}{'max':>9}{'MFU':>8}{'MiB':>9}{'loss':>9}  ")
    variants = [v for v in options.variants.split(",") if all(importlib.util.find_spec(name) for name in NEEDS[v])]
    for mode in options.modes.split(","):
        workers = {variant: Worker(variant) for variant in variants}
        for size, variant in product(options.sizes.split(","), variants):
            folder = str(options.profile.resolve()) if options.profile else ""
            task = Task(variant, size, mode, options.rows, options.length, options.steps, options.warmup, profile=folder)
            lines.append(attempt(workers[variant], task, options.timeout))
            if options.json:
                options.json.write_text(json.dumps({"versions": versions(), "lines": lines}, indent=1) + "\n")
        for worker in workers.values():
            worker.close()
    return 0 if all("tokens_per_second" in line for line in lines) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,3b,8b")
    parser.add_argument("--modes", default="lora,full")
    parser.add_argument("--variants", default=",".join(NEEDS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one task")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="folder for tables of what a step's time went into")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.rows, options.length, options.steps, options.warmup = "tiny", 2, 32, 2, 1
    return options


def versions() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"torch": torch.__version__, "python": sys.version.split()[0], "device": name}


class Worker:
    """A process that has loaded what a variant needs, and does tasks."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self._start()

    def _start(self) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        environment = {**os.environ, **offline, "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir(), f"unsloth_{self.variant}"))}
        command = [sys.executable, "-m", "benchmarks.gpu_sft", "--child", self.variant]
        self._errors = tempfile.TemporaryFile("w+")  # open as long as the process
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process, self._answers), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ANSWER):
                answers.put(line.removeprefix(ANSWER))
        answers.put("")  # it has ended

    def ask(self, task: Task, timeout: float) -> dict[str, Any]:
        """What came of a task. A process that has ended is started again for the next one."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            answer, failed = "", f"longer than {timeout:.0f} s"
        except BrokenPipeError:
            answer, failed = "", self._last_words()
        else:
            failed = self._last_words()
        if answer:
            return json.loads(answer)
        self.close()
        self._start()
        return {"failed": failed}

    def _last_words(self) -> str:
        self._errors.seek(0)
        return "".join([text for text in self._errors.read().splitlines() if text.strip()][-1:]) or "ended without a word"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def attempt(worker: Worker, task: Task, timeout: float) -> dict[str, Any]:
    """The line of a task: with checkpointing where it does not fit without."""
    line = {**asdict(task), **worker.ask(task, timeout)}
    if line.get("failed") == "out of memory" and not task.checkpoint:
        return attempt(worker, replace(task, checkpoint=True), timeout)
    show(task, line)
    return line


def show(task: Task, line: dict[str, Any]) -> None:
    title = f"{task.size} {task.mode:5} {task.variant}"
    if "failed" in line:
        print(f"{title:26}{line['failed']}", flush=True)
        return
    rate = line["tokens_per_second"]
    line["mfu"] = useful_flops(SHAPES[task.size], task.length, full=task.mode == "full") * rate["median"] / CARDS["h100"].peak
    numbers = f"{rate['median']:>10,.0f}{rate['min']:>9,.0f}{rate['max']:>9,.0f}{line['mfu']:>8.1%}{line['memory'] / 2**20:>9,.0f}"
    print(f"{title:26}{numbers}{line['loss']:>9.4f}  {'checkpointed ' if task.checkpoint else ''}{line['kernels']}", flush=True)


# One process


def serve(variant: str) -> int:
    """Loads, then does one task a line until there are no more."""
    load(variant)
    for line in sys.stdin:
        task = Task(**json.loads(line))
        try:
            found = measure(task)
        except torch.OutOfMemoryError as error:
            print(str(error).splitlines()[0], file=sys.stderr)
            found = {"failed": "out of memory"}
        except Exception as error:  # whatever a library raises is this task's result
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(ANSWER + json.dumps(found), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0


def load(variant: str) -> None:
    """The slow imports."""
    for name in ("unsloth", "trl", "liger_kernel.transformers"):  # unsloth before transformers, or it refuses
        if name.split(".")[0] in NEEDS[variant]:
            importlib.import_module(name)
    importlib.import_module("peft")
    if variant == "burnish":
        importlib.import_module("burnish.models.policy")


def measure(task: Task) -> dict[str, Any]:
    notes: list[str] = []
    with Card() as card:
        seconds, losses = by_trainer(task) if task.variant.startswith("trl") else by_step(task, notes)
    rates = sorted(task.rows * task.length / s for s in seconds)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "tokens_per_second": {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]},
        "memory": memory,
        "seconds": seconds,
        "loss": losses[0],  # of the first step: the same weights, rows and mathematics for everyone
        "kernels": "".join(notes),
        "card": card.summary(sum(seconds)),
    }


def by_step(task: Task, notes: list[str]) -> tuple[list[float], list[float]]:
    step = {"burnish": burnish_step, "unsloth": unsloth_step, "unsloth-stock": unsloth_step}.get(task.variant, plain_step)(task, notes)
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(task.warmup + task.steps):
        start = time.perf_counter()
        losses.append(float(step()))  # waits for the device
        seconds.append(time.perf_counter() - start)
    if task.profile:
        profile(Path(task.profile, f"{task.size}-{task.mode}-{task.variant}.txt"), task.device, step)
    return seconds[task.warmup :], losses


def random_model(task: Task) -> Any:
    """The same weights for every variant: LoRA's frozen base in bf16, full fine-tuning in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if task.mode == "lora" else torch.float32)
    try:
        with task.device:
            return LlamaForCausalLM(LlamaConfig(**task.shape, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))  # its parameters in fp32, PEFT's default


def token_rows(task: Task) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SHAPES[task.size].vocabulary, (task.rows, task.length), generator=generator)


def burnish_step(task: Task, notes: list[str]) -> Step:
    import numpy as np

    from burnish.config.objectives import SFT
    from burnish.config.sections import Adapter, Train
    from burnish.data.collate import collate
    from burnish.data.types import Example
    from burnish.engine.backend import Backend
    from burnish.engine.optim import build_optimizer
    from burnish.engine.step import Stepper
    from burnish.models.adapters import attach
    from burnish.models.policy import Policy
    from burnish.objectives.sft import SFTObjective

    backend = Backend(precision="bfloat16", cpu=task.device.type == "cpu")
    model = random_model(task)
    policy = Policy(attach(model, Adapter(rank=16, alpha=32)) if task.mode == "lora" else model).train()
    notes.append(policy.kernels.line())
    if task.checkpoint:
        policy.checkpoint_activations()
    objective, train = SFTObjective(SFT()), Train(learning_rate=1e-4)
    stepper = Stepper(backend, build_optimizer(policy.trainable(), train), policy.trainable(), learning_rate=1e-4)
    examples = [Example(row.numpy().astype(np.int32), np.ones(task.length, np.float32)) for row in token_rows(task)]
    batch = collate(examples, step_weight=float(task.rows * (task.length - 1))).to(task.device)

    def step() -> float:
        with backend.autocast():
            loss = objective(policy, batch)
        stepper.accumulate(loss, batch)
        return stepper.update().loss

    return step


def plain_step(task: Task, _notes: list[str]) -> Step:
    if task.variant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = random_model(task)
    return torch_step(task, with_adapter(model) if task.mode == "lora" else model)


def unsloth_step(task: Task, notes: list[str]) -> Step:
    from unsloth import FastLanguageModel  # isort: skip  # before transformers, or it refuses

    with tempfile.TemporaryDirectory() as folder:
        save_folder(task, folder)
        dtype = torch.bfloat16 if task.mode == "lora" else torch.float32
        checkpointing = "unsloth" if task.checkpoint or task.variant == "unsloth-stock" else False
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=task.length,
            dtype=dtype,
            load_in_4bit=False,
            load_in_16bit=task.mode == "lora",
            full_finetuning=task.mode == "full",
            use_gradient_checkpointing=checkpointing,
        )
    if task.mode == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=names, use_gradient_checkpointing=checkpointing
        )
        notes.append(f"kernels: {unsloth_kernels(model)}")
    return torch_step(task, model, checkpoint=False)


def unsloth_kernels(model: Any) -> str:
    """How many of its layers run its fused nodes."""
    layers = model.get_base_model().model.layers
    found = {
        "qkv": sum(getattr(layer.self_attn.apply_qkv, "__name__", "") == "apply_lora_qkv" for layer in layers),
        "o": sum(getattr(layer.self_attn.apply_o, "__name__", "") == "apply_lora_o" for layer in layers),
        "mlp": sum(layer.mlp.forward.__func__.__name__.startswith("apply_lora_mlp") for layer in layers),
    }
    return ", ".join(f"{name} {count}/{len(layers)}" for name, count in found.items())


def torch_step(task: Task, model: Any, *, checkpoint: bool | None = None) -> Step:
    """A step as anyone would write it around a transformers model."""
    if task.checkpoint if checkpoint is None else checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    rows = token_rows(task).to(task.device)

    def step() -> torch.Tensor:
        with torch.autocast(task.device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def by_trainer(task: Task) -> tuple[list[float], list[float]]:
    """TRL's SFTTrainer over rows that are tokens already."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from benchmarks.peers.hugging_face import Measured, count_inputs, measured

    clock = Clock()
    watch = Measured(clock)  # pyright: ignore[reportArgumentType]
    rows = token_rows(task).tolist() * (task.warmup + task.steps)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(task, folder)
        trainer = measured(SFTTrainer, watch, count_inputs)(
            model=random_model(task),
            args=SFTConfig(
                output_dir=folder,
                max_steps=task.warmup + task.steps,
                per_device_train_batch_size=task.rows,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                max_length=None,
                bf16=True,
                use_cpu=task.device.type == "cpu",
                gradient_checkpointing=task.checkpoint,
                use_liger_kernel=task.variant == "trl-liger",
                dataset_kwargs={"skip_prepare_dataset": True},
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
            processing_class=load_tokenizer(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if task.mode == "lora" else None,
            callbacks=[watch],
        )
        trainer.train()
    return clock.seconds[task.warmup :], clock.losses


class Clock:
    """What `Measured` tells, kept."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._last = 0.0

    def begin(self) -> None:
        self._last = self._last or time.perf_counter()

    def step(self, tokens: int, trained_tokens: int, loss: float) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.losses.append(loss)
        self._last = now


# Tools that insist on files get some.


def save_folder(task: Task, folder: str) -> None:
    random_model(task).save_pretrained(folder)
    save_tokenizer(task, folder)


def save_tokenizer(task: Task, folder: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(SHAPES[task.size].vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w3").save_pretrained(folder)


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
