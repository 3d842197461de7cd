"""The door to accelerate: precision, ranks, trackers."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from burnish.config.sections import Parallel
from burnish.core.errors import ConfigError, DependencyError, TrainingError
from burnish.engine import backend as module
from burnish.engine import backend_trackers as trackers_module
from burnish.engine.backend import Backend, Trackers, resolve_precision
from burnish.engine.backend_context import ContextGroup
from burnish.engine.backend_tensor import TensorGroup
from burnish.engine.grid import Grid

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_on_a_cpu(fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "cpu_has_fast_bf16", lambda: fast)
    assert resolve_precision("auto", CPU) == dtype


@pytest.mark.parametrize("has", [True, False])
def test_precision_on_cuda(has: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An Old GPU")
    cuda = torch.device("cuda")
    assert resolve_precision("auto", cuda) == (torch.bfloat16 if has else torch.float32)
    if has:
        assert resolve_precision("bfloat16", cuda) == torch.bfloat16
    else:
        with pytest.raises(ConfigError, match="An Old GPU has no bfloat16"):
            resolve_precision("bfloat16", cuda)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_products_are_computed_in_the_precision_and_weights_stay_float32(precision: str, dtype: torch.dtype):
    backend = Backend(precision=precision, cpu=True)  # pyright: ignore[reportArgumentType]
    linear = torch.nn.Linear(4, 4)
    with backend.autocast():
        output = linear(torch.randn(2, 4))
    assert output.dtype == dtype
    assert linear.weight.dtype == torch.float32
    assert (backend.loss_scale is not None) == (precision == "float16")


def test_deterministic_is_torchs_own_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        Backend(cpu=True, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_process_pays_nothing():
    backend = Backend(precision="float32", cpu=True)
    assert (backend.rank, backend.world_size, backend.is_main) == (0, 1, True)
    value = object()
    assert backend.gather(value) == [value]
    assert backend.sums({"a": (1.0, 2.0)}) == {"a": (1.0, 2.0)}
    assert backend.any(True) and not backend.any(False)
    parameter = torch.nn.Parameter(torch.ones(2))
    backend.average_gradients([parameter])
    assert parameter.grad is None


def test_on_a_cpu_freed_memory_is_kept_for_the_next_step(monkeypatch: pytest.MonkeyPatch):
    calls: list[bool] = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append(True))
    Backend(precision="float32", cpu=True)
    assert calls == [True]


def test_on_other_devices_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    class OnCuda:
        device, process_index, num_processes = torch.device("cuda"), 0, 1

    monkeypatch.setattr(module, "PartialState", lambda cpu: OnCuda())
    monkeypatch.setattr(module, "keep_freed_memory", lambda: pytest.fail("called for a GPU"))
    assert Backend(precision="float32").device.type == "cuda"


def test_a_group_that_does_not_form_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # what a launcher sets; the group of this process is there already, and has one member
    with pytest.raises(TrainingError, match="started 2 processes, but this one sees 1"):
        Backend(cpu=True)


def several(monkeypatch: pytest.MonkeyPatch, processes: int, **parallel: object) -> Backend:
    """The backend of one of several processes that never speak."""

    class Several:
        device, process_index, num_processes = CPU, 0, processes

    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(module, "PartialState", lambda **options: Several())
    backend = Backend(precision="float32", parallel=Parallel.model_validate(parallel), cpu=True)
    monkeypatch.setattr(backend, "gather", lambda value: [value] * processes)
    return backend


def test_auto_is_data_parallel_where_everything_fits(monkeypatch: pytest.MonkeyPatch):
    backend = several(monkeypatch, 4)
    backend.settle(2 * 2**30, 6 * 2**30, 10 * 2**30)
    assert (backend.strategy, backend.sharded, backend.load_device) == ("ddp", False, CPU)
    assert backend.reason == "8.0 GiB of weights, gradients and optimiser state fit into 8.5 GiB"


def test_auto_is_shards_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    backend = several(monkeypatch, 4)
    backend.settle(2 * 2**30, 6 * 2**30, 9 * 2**30)
    assert (backend.strategy, backend.shards, backend.load_device) == ("fsdp", 4, CPU)
    assert backend.reason == "8.0 GiB of weights, gradients and optimiser state exceed 7.6 GiB"


@pytest.mark.parametrize(("room", "where"), [(10, "cuda"), (2, "cpu")])
def test_weights_that_fit_on_no_device_are_loaded_on_the_host(room: float, where: str, monkeypatch: pytest.MonkeyPatch):
    backend = several(monkeypatch, 2, strategy="fsdp")
    backend.device = backend.load_device = torch.device("cuda")
    backend.settle(4 * 2**30, 0, room * 2**30)
    assert backend.load_device.type == where


def test_codes_are_not_cut(monkeypatch: pytest.MonkeyPatch):
    backend = several(monkeypatch, 2)
    backend.settle(8, 0, 1, cuttable=False)
    assert backend.strategy == "ddp"


def test_groups_of_shards(monkeypatch: pytest.MonkeyPatch):
    assert several(monkeypatch, 8, strategy="hsdp", shards=4).shards == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert several(monkeypatch, 8, strategy="hsdp").shards == 2
    with pytest.raises(ConfigError, match="8 processes cannot be cut into groups of 3"):
        _ = several(monkeypatch, 8, strategy="hsdp", shards=3).shards
    assert several(monkeypatch, 8, strategy="ddp").shards == 1


def test_ranks_that_share_micro_batches_count_once(monkeypatch: pytest.MonkeyPatch):
    backend = several(monkeypatch, 4, context=2)
    assert (backend.world_size, backend.data_world_size, backend.data_rank, backend.coupled) == (4, 2, 0, True)
    monkeypatch.setattr(backend, "gather", lambda value: [{"loss": (float(rank // 2), 1.0)} for rank in range(4)])
    assert backend.sums({"loss": (0.0, 1.0)}) == {"loss": (1.0, 2.0)}
    assert several(monkeypatch, 4).coupled is False


def test_one_process_needs_no_strategy(monkeypatch: pytest.MonkeyPatch):
    assert Backend(parallel=Parallel(strategy="fsdp"), cpu=True).strategy == "none"
    with pytest.raises(ConfigError, match="'none' means one process, found 2"):
        several(monkeypatch, 2, strategy="none")


def test_seeds():
    backend = Backend(precision="float32", cpu=True)
    backend.seed(3)
    first = torch.rand(2)
    backend.seed(3, per_rank=True)
    assert torch.equal(first, torch.rand(2))  # rank 0


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_a_missing_tracker_is_named_before_training(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=f"the tracker '{kind}' needs the package {kind}") as caught:
        Backend(precision="float32", cpu=True).trackers(["csv", kind], name="run", folder=tmp_path, config={})
    assert caught.value.hint == f"pip install 'burnish[{kind}]'"


def test_tensorboard_gets_the_numbers(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backend = Backend(precision="float32", cpu=True)
    config = {"train": {"learning_rate": 0.1, "rates": [], "clip": None}, "model": "m"}
    trackers = backend.trackers(["csv", "tensorboard"], name="run", folder=tmp_path, config=config)
    for step in (1, 2):
        trackers.log({"loss": 1.0 / step}, step=step)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize(
    ("kind", "environment", "project"),
    [
        ("wandb", {}, "burnish"),
        ("wandb", {"WANDB_PROJECT": "mine"}, "mine"),
        ("trackio", {}, "burnish"),
        ("trackio", {"TRACKIO_PROJECT": "mine"}, "mine"),
        ("mlflow", {}, "burnish"),
    ],
)
def test_runs_of_one_project_are_told_apart_by_their_folders(
    kind: str, environment: dict[str, str], project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[tuple[str, dict[str, object]]] = []
    stored: list[dict[str, object]] = []

    class Recorder:
        def __init__(self, project: str, **options: object) -> None:
            started.append((project, options))

        def start(self) -> None:
            pass

        def store_init_configuration(self, values: dict[str, object]) -> None:
            stored.append(values)

    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(trackers_module.LOGGER_TYPE_TO_CLASS, kind, Recorder)
    config = {"data": {"train": [{"path": "rows.jsonl"}]}, "train": {"seed": 42}}
    Backend(precision="float32", cpu=True).trackers([kind], name="first", folder=tmp_path, config=config)
    assert started == [(project, {"run_name" if kind == "mlflow" else "name": "first"})]
    assert stored == [{"data.train": '[{"path": "rows.jsonl"}]', "train.seed": 42}]


class Broken:
    def log(self, values: object, step: int) -> None:
        raise ConnectionError("no network")

    def finish(self) -> None:
        raise ConnectionError("no network")


def test_a_tracker_that_fails_does_not_end_the_run(capsys: pytest.CaptureFixture[str]):
    trackers = Trackers({"wandb": Broken()})  # pyright: ignore[reportArgumentType]
    trackers.log({"loss": 1.0}, step=1)
    trackers.log({"loss": 1.0}, step=2)
    trackers.close()
    assert capsys.readouterr().err.count("the tracker 'wandb' failed and is switched off") == 1


def _exchanged(rank: int) -> dict[str, object]:
    """What two ranks that share tokens get from each other, and the gradients of their losses together."""
    group = ContextGroup(Grid(rank, 2, context=2))
    found: dict[str, object] = {"place": (group.rank, group.size)}
    for name, sent, weights in (
        ("exchange", torch.tensor([[1.0], [2.0]]) + 10 * rank, torch.tensor([[3.0], [5.0]]) * (rank + 1)),
        ("gather", torch.tensor([1.0, 2.0]) + 10 * rank, torch.tensor([3.0, 5.0, 7.0, 9.0]) * (rank + 1)),
    ):
        for dtype in (torch.float64, torch.bfloat16):
            leaf = sent.to(dtype).requires_grad_()
            made = getattr(group, name)(leaf)
            (made * weights.to(dtype)).sum().backward()
            assert leaf.grad is not None and made.dtype == leaf.grad.dtype == dtype
            found[f"{name} {dtype}"] = (made.tolist(), leaf.grad.tolist())
    return found


def _added(rank: int) -> dict[str, object]:
    """What two ranks that share layers get from each other, and the gradients of their one loss; of a size that is not a multiple of 2."""
    group = TensorGroup(Grid(rank, 2, tensor=2))
    found: dict[str, object] = {}
    for name in ("spread", "total"):
        for dtype in (torch.float64, torch.bfloat16):
            leaf = (torch.tensor([[1.0, 2.0, 3.0]]) + 10 * rank).to(dtype).requires_grad_()
            made = getattr(group, name)(leaf)
            (made * torch.tensor([[1.0, 2.0, 4.0]], dtype=dtype) * (rank + 1)).sum().backward()
            assert leaf.grad is not None and made.dtype == leaf.grad.dtype == dtype
            found[f"{name} {dtype}"] = (made.tolist(), leaf.grad.tolist())
    return found


def _rank(rank: int, port: int, results: str) -> None:
    import os

    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    backend = Backend(precision="float32", cpu=True)
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(float(rank))
    backend.prepare(model)
    model.weight.grad = torch.full((1, 2), float(rank + 1))
    if rank == 0:
        model.bias.grad = torch.ones(1)
    backend.average_gradients(model.parameters())
    found = {
        "weight": model.weight.tolist(),
        "gradients": [model.weight.grad.tolist(), None if model.bias.grad is None else model.bias.grad.tolist()],
        "sums": backend.sums({"a": (1.0 + rank, 1.0), **({"b": (5.0, 2.0)} if rank else {})}),
        "any": backend.any(rank == 1),
        "main": backend.is_main,
        **_exchanged(rank),
        **_added(rank),
    }
    torch.save(found, f"{results}/{rank}")
    backend.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_model(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert found["weight"] == [[0.0, 0.0]]
        assert found["gradients"] == [[[1.5, 1.5]], [0.5]]
        assert found["sums"] == {"a": (3.0, 2.0), "b": (5.0, 2.0)}
        assert found["any"] is True
        assert found["main"] is (rank == 0)
        assert found["place"] == (rank, 2)
        for dtype in (torch.float64, torch.bfloat16):
            # Piece s goes to rank s, so its gradient is what rank s has for the piece of this rank.
            made, gradient = found[f"exchange {dtype}"]
            assert made == [[1.0 + rank], [11.0 + rank]]
            assert gradient == ([[3.0], [6.0]] if rank == 0 else [[5.0], [10.0]])
            # Both ranks use every value, the second one with twice the weights.
            made, gradient = found[f"gather {dtype}"]
            assert made == [1.0, 2.0, 11.0, 12.0]
            assert gradient == ([9.0, 15.0] if rank == 0 else [21.0, 27.0])
            # What all have, with the sum of both ranks' gradients; and the sum of what each has, with its gradient as it is.
            made, gradient = found[f"spread {dtype}"]
            assert (made, gradient) == ([[1.0 + 10 * rank, 2.0 + 10 * rank, 3.0 + 10 * rank]], [[3.0, 6.0, 12.0]])
            made, gradient = found[f"total {dtype}"]
            assert (made, gradient) == ([[12.0, 14.0, 16.0]], [[1.0 + rank, 2.0 + 2 * rank, 4.0 + 4 * rank]])


def test_layers_are_cut_on_the_host_where_a_device_does_not_hold_them(monkeypatch: pytest.MonkeyPatch):
    backend = Backend(precision="float32", cpu=True, parallel=Parallel(strategy="auto"))
    monkeypatch.setattr(backend, "gather", lambda value: [value])  # pyright: ignore[reportUnknownLambdaType]
    backend.grid, backend.strategy, backend.device = Grid(0, 2, tensor=2), "auto", torch.device("meta")
    backend.load_device = backend.device
    backend.settle(8.0, 0.0, 10.0)
    assert (backend.strategy, backend.load_device, backend.spreads) == ("ddp", torch.device("meta"), False)
    backend.settle(9.0, 0.0, 10.0)
    assert (backend.load_device, backend.spreads) == (torch.device("cpu"), False)


def test_ranks_that_share_layers_draw_the_same_random_numbers():
    drawn: list[float] = []
    for rank in range(4):
        backend = Backend(precision="float32", cpu=True)
        backend.rank, backend.grid = rank, Grid(rank, 4, tensor=2)
        backend.seed(3, per_rank=True)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
