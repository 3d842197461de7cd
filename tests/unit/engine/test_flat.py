"""FlatAdamW is torch's AdamW to rounding, step by step, and survives what is done to parameters from outside."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.engine.conftest import TinyPolicy
from tests.unit.engine.test_loop import SignalAt
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config.sections import Adapter, Train
from burnish.core.errors import Interrupted
from burnish.engine import checkpoint
from burnish.engine.backend import Backend
from burnish.engine.checkpoint import Checkpoint
from burnish.engine.flat import FlatAdamW
from burnish.engine.loop import Job
from burnish.engine.loop import train as train_loop
from burnish.engine.optim import build_optimizer, parameter_groups
from burnish.kernels.adamw import BLOCK
from burnish.models import adapters
from burnish.models.adapters import attach
from burnish.models.quiet import quiet

SHAPES = {"a.lora_A": (4, 33), "a.lora_B": (40, 4), "norm": (33,), "scalar": (), "big.lora_A": (130, 64)}


def named(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Rates and decays of their own, as LoRA+ has them, in an order that is not the parameters'."""
    own = {"lora_A": {"lr": 0.01, "weight_decay": 0.1}, "lora_B": {"lr": 0.16, "weight_decay": 0.1, "betas": (0.8, 0.95)}, "": {"lr": 0.02}}
    left = dict(parameters)
    found = []
    for key, settings in own.items():
        found.append({"params": [left.pop(name) for name in list(left) if key in name], **settings})
    return found


def gradients(parameters: dict[str, nn.Parameter], step: int, *, keep_views: bool = True) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters.values():
        gradient = (torch.randn(p.shape, generator=generator) * 10.0 ** (step % 3 - 2)).to(p.dtype)
        if keep_views and p.grad is not None:
            p.grad.add_(gradient)  # as autograd adds it
        else:
            p.grad = gradient


def close(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter], tolerance: float = 1e-6) -> None:
    for name in a:
        torch.testing.assert_close(a[name].detach(), b[name].detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("flat_gradients", [True, False])
def test_every_step_is_torchs(options: dict[str, bool], flat_gradients: bool):
    ours, theirs = named(), named()
    flat = FlatAdamW(groups(ours), flat_gradients=flat_gradients)
    torchs = torch.optim.AdamW(groups(theirs), weight_decay=0.0, **options)
    for step in range(12):
        for optimizer in (flat, torchs):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        if step in (3, 4):  # skipped: the gradient is thrown away
            gradients(ours, 99)
            flat.zero_grad()
            continue
        gradients(ours, step)
        gradients(theirs, step, keep_views=False)
        flat.step()
        torchs.step()
        flat.zero_grad()
        close(ours, theirs)
        for a, b in zip(ours.values(), theirs.values(), strict=True):
            assert flat.state[a]["step"] == torchs.state[b]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(flat.state[a][key], torchs.state[b][key], rtol=1e-6, atol=1e-7)


def test_a_factor_on_the_gradient_is_part_of_the_step():
    ours, theirs = named(), named()
    flat, torchs = FlatAdamW(groups(ours)), FlatAdamW(groups(theirs))
    gradients(ours, 1)
    gradients(theirs, 1)
    for p in theirs.values():
        assert p.grad is not None
        p.grad.mul_(0.37)
    flat.step(grad_scale=0.37)
    torchs.step()
    close(ours, theirs)


def test_autograd_adds_to_the_views():
    parameters = named()
    flat = FlatAdamW(groups(parameters))
    (buffer,) = flat.flat_parameters()
    for _ in range(2):
        sum((p * p).sum() for p in parameters.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert buffer.grad is not None
    memory = buffer.grad.untyped_storage().data_ptr()
    for p in parameters.values():
        assert p.grad is not None and p.grad.untyped_storage().data_ptr() == memory
        torch.testing.assert_close(p.grad, 4 * p.detach())
    flat.zero_grad(set_to_none=True)
    assert not buffer.grad.any()
    assert all(p.grad is not None and p.grad.untyped_storage().data_ptr() == memory for p in parameters.values())


def test_the_norm_is_exact():
    parameters = {"w": nn.Parameter(torch.zeros(1_000_003)), "v": nn.Parameter(torch.zeros(7, dtype=torch.float64))}
    flat = FlatAdamW(parameters.values())
    generator = torch.Generator().manual_seed(0)
    for p in parameters.values():
        assert p.grad is not None
        p.grad.copy_(torch.rand(p.shape, generator=generator))
    exact = torch.cat([p.grad.double() for p in parameters.values() if p.grad is not None]).norm()
    assert flat.gradient_norm().item() == pytest.approx(exact.item(), rel=1e-6)


def test_gradients_taken_out_of_the_buffer_come_back():
    ours, theirs = named(), named()
    flat = FlatAdamW(groups(ours))
    torchs = torch.optim.AdamW(groups(theirs), weight_decay=0.0)
    for step in range(3):
        for p in ours.values():
            p.grad = None  # what model.zero_grad() does
        gradients(ours, step, keep_views=False)
        gradients(theirs, step, keep_views=False)
        norm = torch.nn.utils.get_total_norm([p.grad for p in ours.values() if p.grad is not None])
        assert flat.gradient_norm().item() == pytest.approx(norm.item(), rel=1e-6)
        flat.step()
        torchs.step()
    close(ours, theirs)


def test_a_missing_gradient_is_a_zero():
    ours, theirs = named(), named()
    flat, zero = FlatAdamW(groups(ours)), FlatAdamW(groups(theirs))
    for step in range(2):
        gradients(ours, step)
        gradients(theirs, step)
        ours["norm"].grad = None
        theirs["norm"].grad.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        flat.step()
        zero.step()
        flat.zero_grad()
        zero.zero_grad()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_taken_out_of_the_buffer_come_back(bits: Any):
    ours, theirs = named(), named()
    flat, undisturbed = FlatAdamW(groups(ours), bits=bits), FlatAdamW(groups(theirs), bits=bits)
    for step in range(4):
        if step == 2:
            for p in ours.values():  # what model.to(device) does
                p.data = p.data.clone()
        if step == 3:
            flat.release()
            assert all(p.grad is None and p.untyped_storage().nbytes() == p.nbytes for p in ours.values())
        gradients(ours, step)
        gradients(theirs, step)
        flat.step()
        undisturbed.step()
        flat.zero_grad()
        undisturbed.zero_grad()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_module_changes_its_type():
    model = nn.Linear(8, 8)
    flat = FlatAdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    flat.step()
    model.double()
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    flat.step()
    assert [buffer.dtype for buffer in flat.flat_parameters()] == [torch.float64]
    assert all(flat.state[p]["exp_avg"].dtype == torch.float64 and flat.state[p]["step"] == 2 for p in model.parameters())


def test_a_deep_copy_goes_its_own_way():
    ours = named()
    flat = FlatAdamW(groups(ours))
    gradients(ours, 0)
    flat.step()
    flat.zero_grad()
    copies, twin = copy.deepcopy((ours, flat))
    before = {name: p.detach().clone() for name, p in ours.items()}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in copies.values())
    gradients(copies, 1)
    twin.step()
    assert all(torch.equal(ours[name], before[name]) for name in ours)
    gradients(ours, 1)
    flat.step()
    assert all(torch.equal(ours[name], copies[name]) for name in ours)


def test_parameters_of_several_types_and_large_ones_have_buffers_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("burnish.engine.flat._MOST", 2 * BLOCK)
    mixed = {**named(), "half": nn.Parameter(torch.randn(10).bfloat16())}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in mixed.items()}
    flat, torchs = FlatAdamW(mixed.values(), lr=0.01), torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.0, fused=True)
    assert len(flat.flat_parameters()) == 4
    for step in range(3):
        gradients(mixed, step)
        gradients(theirs, step, keep_views=False)
        flat.step()
        torchs.step()
        flat.zero_grad()
    close(mixed, theirs)


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_goes_to_and_from_torch(direction: str, tmp_path: Path):
    def make(parameters: dict[str, nn.Parameter], ours: bool) -> torch.optim.Optimizer:
        return FlatAdamW(groups(parameters)) if ours else torch.optim.AdamW(groups(parameters), weight_decay=0.0, fused=True)

    first, second = named(), named()
    before, kept = make(first, direction == "to torch"), make(second, direction == "to torch")
    for step in range(3):
        for parameters, optimizer in ((first, before), (second, kept)):
            gradients(parameters, step)
            optimizer.step()
            optimizer.zero_grad()
    checkpoint.save(tmp_path, Checkpoint(3, {name: p.detach() for name, p in first.items()}, before.state_dict(), {}, {}))
    found = checkpoint.load(tmp_path / "step-000003")
    names = set(load_file(tmp_path / "step-000003/optimizer.safetensors"))
    assert names == {f"state.{number}.{key}" for number in range(len(first)) for key in ("step", "exp_avg", "exp_avg_sq")}
    third = {name: nn.Parameter(found.weights[name].clone()) for name in first}
    after = make(third, direction == "from torch")
    after.load_state_dict(found.optimizer)
    for step in range(3, 6):
        for parameters, optimizer in ((second, kept), (third, after)):
            gradients(parameters, step)
            optimizer.step()
            optimizer.zero_grad()
    close(second, third)


def test_parameters_with_different_numbers_of_steps():
    """A state of torch's, where an expert that saw no token was passed over."""
    theirs = named()
    torchs = torch.optim.AdamW(groups(theirs), weight_decay=0.0)
    for step in range(4):
        gradients(theirs, step, keep_views=False)
        if step == 1:
            theirs["big.lora_A"].grad = theirs["a.lora_B"].grad = None
        torchs.step()
    ours = {name: nn.Parameter(p.detach().clone()) for name, p in theirs.items()}
    flat = FlatAdamW(groups(ours))
    flat.load_state_dict(torchs.state_dict())
    assert sorted(int(state["step"]) for state in flat.state.values()) == [3, 3, 4, 4, 4]
    gradients(ours, 5)
    gradients(theirs, 5, keep_views=False)
    flat.step()
    torchs.step()
    close(ours, theirs)


def test_another_optimizers_state_is_refused():
    ours, theirs = named(), named()
    flat = FlatAdamW(groups(ours))
    sgd = torch.optim.SGD(groups({k: nn.Parameter(p.detach()) for k, p in theirs.items()}), momentum=0.9)
    for group in sgd.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    sgd.step()
    with pytest.raises(ValueError, match="'step' of a parameter"):
        flat.load_state_dict(sgd.state_dict())
    amsgrad = torch.optim.AdamW(groups(theirs), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        flat.load_state_dict(amsgrad.state_dict())
    state = flat.state_dict()
    assert len(state["state"]) == 5  # as it was
    state["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"'exp_avg' of a parameter of shape \(4, 33\) is \(2, 2\)"):
        flat.load_state_dict(state)


def test_master_weights_follow_the_fp32_run():
    """Updates far below bf16's resolution add up in the master, and the parameters are its rounding."""
    half = named(torch.bfloat16)
    full = {name: nn.Parameter(p.detach().float()) for name, p in half.items()}
    plain = {name: nn.Parameter(p.detach().clone()) for name, p in half.items()}
    ours = FlatAdamW(half.values(), lr=1e-5, master_weights=True)
    truth = FlatAdamW(full.values(), lr=1e-5)
    lost = FlatAdamW(plain.values(), lr=1e-5)
    signs = {name: p.detach().sign() for name, p in half.items()}
    for _ in range(60):
        for parameters, optimizer in ((half, ours), (full, truth), (plain, lost)):
            for name, p in parameters.items():
                assert p.grad is not None
                p.grad.add_(signs[name])
            optimizer.step()
            optimizer.zero_grad()
    for name, p in half.items():
        assert torch.equal(p, full[name].detach().bfloat16())
        assert torch.equal(ours.state[p]["master"], full[name].detach())
        assert ours.state[p]["exp_avg"].dtype == torch.float32
    start = named(torch.bfloat16)["a.lora_B"]
    large = start.detach().abs() > 0.1  # where bf16's steps are above 2e-4
    assert torch.equal(plain["a.lora_B"][large], start[large])  # without a master the updates go nowhere
    assert not torch.equal(half["a.lora_B"][large], start[large])
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in half.items()}
    twin = FlatAdamW(twins.values(), lr=1e-5, master_weights=True)
    twin.load_state_dict(copy.deepcopy(ours.state_dict()))
    for parameters, optimizer in ((half, ours), (twins, twin)):
        gradients(parameters, 3)
        optimizer.step()
    assert all(torch.equal(half[name], twins[name]) for name in half)
    assert all(torch.equal(ours.state[half[n]]["master"], twin.state[twins[n]]["master"]) for n in half)


def test_8bit_state_is_two_bytes_and_goes_on_bit_for_bit():
    ours = {"w": nn.Parameter(torch.randn(100, 100)), "norm": nn.Parameter(torch.ones(100))}
    flat = FlatAdamW(ours.values(), bits=8)
    state = flat.state_dict()["state"]
    assert sum(value.nbytes for key, value in state[0].items() if key != "step") / 10_000 < 2.1
    assert state[1]["exp_avg"].dtype == torch.float32  # small ones stay exact
    for step in range(2):
        gradients(ours, step)
        flat.step()
        flat.zero_grad()
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    twin = FlatAdamW(twins.values(), bits=8, flat_gradients=False)
    twin.load_state_dict(copy.deepcopy(flat.state_dict()))
    for parameters, optimizer in ((ours, flat), (twins, twin)):
        gradients(parameters, 3)
        optimizer.step()
    assert all(torch.equal(ours[name], twins[name]) for name in ours)


def test_8bit_takes_over_fp32_moments():
    ours = {"w": nn.Parameter(torch.randn(100, 100))}
    flat = FlatAdamW(ours.values(), lr=0.01)
    gradients(ours, 0)
    flat.step()
    twins = {"w": nn.Parameter(ours["w"].detach().clone())}
    narrow = FlatAdamW(twins.values(), lr=0.01, bits=8)
    narrow.load_state_dict(flat.state_dict())
    before = ours["w"].detach().clone()
    flat.zero_grad()
    for parameters, optimizer in ((ours, flat), (twins, narrow)):
        gradients(parameters, 1)
        optimizer.step()
    moved, other = ours["w"].detach() - before, twins["w"].detach() - before
    assert (moved - other).abs().max() < 0.1 * moved.abs().max()


def test_the_autograd_version_of_a_parameter_counts_its_updates():
    parameter = nn.Parameter(torch.ones(3))
    flat = FlatAdamW([parameter])
    kept = (parameter * parameter).sum()
    assert parameter.grad is not None
    parameter.grad.fill_(1.0)
    flat.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_ranks_can_average_one_buffer(monkeypatch: pytest.MonkeyPatch):
    parameters = named()
    flat = FlatAdamW(groups(parameters))
    backend = Backend(precision="float32", cpu=True)
    reduced: list[int] = []
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda tensor, group=None: (reduced.append(tensor.numel()), tensor.add_(tensor.clone()))
    )
    backend.world_size = 2
    gradients(parameters, 0)
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    backend.average_gradients(flat.flat_parameters())
    assert len(reduced) == 1
    for name, p in parameters.items():
        assert p.grad is not None and torch.equal(p.grad, before[name])  # both ranks had the same


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in job.policy.trainable().items()}


def flat_job(make_job: Callable[..., Job], folder: str, bits: Any, **settings: Any) -> Job:
    job = make_job(folder, dropout=0.2, **settings)
    job.optimizer = FlatAdamW(parameter_groups(job.policy.trainable(), job.train), bits=bits)
    return job


@pytest.mark.parametrize("bits", [32, 8])
def test_resumed_equals_uninterrupted(make_job: Callable[..., Job], bits: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("burnish.engine.flat._SMALL", 64)
    settings = {"weight_decay": 0.1, "clip": 0.5}
    whole = flat_job(make_job, "whole", bits, **settings)
    train_loop(whole)
    with pytest.raises(Interrupted):
        train_loop(flat_job(make_job, "parts", bits, **settings, callbacks=[SignalAt(4)]))
    again = flat_job(make_job, "parts", bits, **settings)
    assert train_loop(again).resumed_from == again.checkpoints / "step-000004"
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    left, right = (checkpoint.flatten(job.optimizer.state_dict())[1] for job in (whole, again))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_leaves_ordinary_parameters_behind(make_job: Callable[..., Job]):
    job = flat_job(make_job, "run", 32)
    train_loop(job)
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.grad is None for p in job.policy.trainable().values())


def test_a_run_is_that_of_torchs_adamw(make_job: Callable[..., Job]):
    flat, torchs = flat_job(make_job, "flat", 32, weight_decay=0.1, clip=0.5), make_job("torch", dropout=0.2, weight_decay=0.1, clip=0.5)
    assert isinstance(torchs.optimizer, torch.optim.AdamW)  # a whole model
    train_loop(flat)
    train_loop(torchs)
    first, second = weights(flat), weights(torchs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_adapters_have_flat_buffers_and_whole_models_do_not():
    assert isinstance(build_optimizer(named(), Train()), FlatAdamW)
    assert type(build_optimizer(TinyPolicy().trainable(), Train())) is torch.optim.AdamW


def test_options_are_kept_by_a_copy():
    flat = copy.deepcopy(FlatAdamW([nn.Parameter(torch.ones(5000))], bits=8, flat_gradients=False))
    assert dataclasses.astuple(flat._options) == (8, False, False, "auto")
    assert not flat.flat_gradients


def test_a_whole_model_is_saved_from_its_views(tmp_path: Path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
    )
    model = LlamaForCausalLM(config)
    flat = FlatAdamW(model.parameters(), lr=0.01)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    flat.step()
    with quiet():
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 2 * sum(p.nbytes for p in model.parameters())


def test_an_adapter_is_saved_and_loaded_in_its_views(tmp_path: Path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
    )
    model = attach(LlamaForCausalLM(config), Adapter(rank=2, alpha=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = FlatAdamW(trained.values(), lr=0.01)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    flat.step()
    kept = {name: p.detach().clone() for name, p in trained.items()}
    adapters.save(model, tmp_path)
    state = {name.removesuffix(".weight"): value for name, value in load_file(tmp_path / adapters.WEIGHTS_FILE).items()}
    assert len(state) == len(kept)
    assert all(torch.equal(state[name.replace(".default", "").removesuffix(".weight")], value) for name, value in kept.items())
    model.load_state_dict({name: torch.zeros_like(p) for name, p in trained.items()}, strict=False)
    (buffer,) = flat.flat_parameters()
    assert not buffer.any()  # what is loaded arrives in the buffer
