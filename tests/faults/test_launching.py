"""`burnish train` in several processes: what comes out, how it stops, and what is said when a process dies or hangs.

The processes are real. What goes wrong in them is an objective of the user's own, as a run file may name one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

PATIENCE = 240  # seconds for anything on a machine that is very busy
OBJECTIVE = """
import os, signal, time
rank, calls, fault = os.environ.get("RANK", "0"), [0], os.environ.get("FAULT", "-1:0:none").split(":")
def loss(policy, batch):
    calls[0] += 1
    time.sleep(float(os.environ.get("SLOW", "0")))
    holder, _, room = os.environ.get("ROOM", "").partition(":")  # from the fifth call on, a rank holds so many tokens at once
    if holder == rank and calls[0] > 4 and len(batch.input_ids) > int(room):
        raise MemoryError("a fault of the test")
    mark = os.environ.get("ONCE")
    if fault[0] == rank and calls[0] == int(fault[1]) and not (mark and os.path.exists(mark)):
        if mark:
            open(mark, "w").close()
        match fault[2]:
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "stop": os.kill(os.getpid(), signal.SIGSTOP)
            case "sleep": time.sleep(1000)
            case "raise": raise ZeroDivisionError("a fault of the test")
    return -(batch.token_weights * policy.token_stats(batch).logprobs).sum()
"""
FORMAT = """
import os
def convert(row):
    with open(os.environ["COUNT"], "a") as file:
        file.write(os.environ.get("RANK", "0") + "\\n")
    if row["prompt"] == os.environ.get("BAD"):
        raise ValueError("a bad row")
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
"""


class Project:
    """A folder with a model, rows and a run file."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        shutil.copytree(model, folder / "model")
        rows = [{"prompt": f"ask {i} " * (1 + i % 3), "completion": f"say {i} " * (1 + i % 5)} for i in range(36)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "faulty.py").write_text(OBJECTIVE)
        (folder / "own.py").write_text(FORMAT)
        (folder / "run.yaml").write_text(
            "model: ./model\nadapter: {kind: lora, rank: 4}\ndata: {train: rows.jsonl, eval: 0.1, max_length: 96, cache: ./cache}\n"
            "objective: ./faulty.py:loss\nsave: {every: 2st}\n"
            "train: {batch_size: 7, precision: float32, steps: 8, micro_batch_tokens: 160}\noutput: runs/first\n"
        )
        package = str(Path(__file__).resolve().parents[2] / "src")
        keep = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        self.environ = keep | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *overrides: str, launcher: Sequence[str] = (sys.executable,), **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*launcher, "-m", "burnish", "train", "run.yaml", *overrides],
            cwd=self.folder,
            env=self.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *overrides: str, launcher: Sequence[str] = (sys.executable,), **environ: str) -> tuple[int, str]:
        process = self.start(*overrides, launcher=launcher, **environ)
        printed, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, printed

    def losses(self, output: str) -> list[float]:
        lines = (self.folder / "runs" / output / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [json.loads(line)["loss"] for line in lines]

    def ranks(self, process: subprocess.Popen[str]) -> dict[int, int]:
        """Rank -> process id, of the processes that this one has started."""
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or int((entry / "stat").read_text().rpartition(")")[2].split()[1]) != process.pid:
                    continue
                variables = dict(item.partition("=")[::2] for item in (entry / "environ").read_text().split("\0"))
                if "LOCAL_RANK" in variables:
                    found[int(variables["RANK"])] = int(entry.name)
            except OSError:
                continue
        return found


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Iterator[Project]:
    made = Project(tmp_path, tiny_model)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_steps(project: Project, output: str, steps: int) -> Callable[[], bool]:
    file = project.folder / "runs" / output / "metrics.jsonl"
    return lambda: file.is_file() and len(file.read_text().splitlines()) >= steps


def same_outcome(project: Project, one: str, other: str) -> None:
    assert project.losses(one) == pytest.approx(project.losses(other), abs=1e-6)
    weights = [load_file(project.folder / "runs" / name / "model/adapter_model.safetensors") for name in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert value == pytest.approx(weights[1][key], abs=1e-6), key


def test_two_processes_are_one_and_prepare_the_data_once(project: Project) -> None:
    own = ["data.train={path: rows.jsonl, format: './own.py:convert'}", "data.eval=null"]
    counts = project.folder / "first", project.folder / "second"
    assert project.run(*own, "output=runs/one", "data.cache=./cache-1", COUNT=str(counts[0]))[0] == 0
    code, printed = project.run(*own, "output=runs/two", "data.cache=./cache-2", "parallel.processes=2", COUNT=str(counts[1]))
    assert code == 0, printed
    assert printed.count("training ") == 1 and "on 2 x cpu" in printed and "starting 2 processes" in printed
    same_outcome(project, "one", "two")
    once, twice = (file.read_text().split() for file in counts)
    # Choosing a format looks at rows of its own accord in each process; making examples of them happens in the first alone.
    assert set(once) == {"0"} and twice.count("0") == len(once) and twice.count("1") == len(once) - 36


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_goes_on(project: Project, number: signal.Signals) -> None:
    more = ["output=runs/stopped", "parallel.processes=2", "save.every=100st"]
    process = project.start(*more, SLOW="0.2")
    until(has_steps(project, "stopped", 1))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the whole foreground group
    else:
        process.send_signal(number)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, printed
    assert printed.count("stopping after this step") == 1 and printed.count("stopped after step") == 1 and "error:" not in printed
    assert "Traceback" not in printed
    assert project.run(*more)[0] == 0
    assert project.run("output=runs/whole")[0] == 0
    same_outcome(project, "stopped", "whole")


def test_a_bad_row_is_said_once(project: Project) -> None:
    own = "data.train={path: rows.jsonl, format: './own.py:convert'}"
    code, printed = project.run(own, "parallel.processes=3", COUNT=str(project.folder / "count"), BAD="ask 35 ask 35 ask 35 ")
    assert code == 2, printed
    assert printed.count("error: ") == 1 and "a bad row" in printed and "Traceback" not in printed
    assert not (project.folder / "runs").exists()


def test_a_mistake_in_the_settings_is_said_once(project: Project) -> None:
    (project.folder / "model" / "model.safetensors").unlink()
    code, printed = project.run("parallel.processes=2")
    assert code == 2 and printed.count("error: ") == 1, printed
    code, printed = project.run("parallel.strategy=none", "parallel.processes=2")
    assert code == 2 and "parallel.processes is 2" in printed and "starting" not in printed


def test_a_killed_rank_is_named_and_the_run_goes_on_by_itself(project: Project) -> None:
    once = str(project.folder / "once")
    code, printed = project.run("output=runs/again", "parallel.processes=2", "parallel.restarts=1", FAULT="1:8:kill", ONCE=once)
    assert code == 0, printed
    assert re.search(r"error: rank 1 \(pid \d+\) was killed by SIGKILL", printed) and "starting again (1 of 1)" in printed
    assert "going on from" in printed and "Traceback" not in printed
    assert project.run("output=runs/whole")[0] == 0
    same_outcome(project, "again", "whole")


def test_shards_that_run_out_of_memory_go_on_in_smaller_micro_batches(project: Project) -> None:
    two = "parallel={strategy: fsdp, processes: 2}"
    assert project.run("output=runs/whole", two)[0] == 0
    code, printed = project.run("output=runs/smaller", two, ROOM="1:100")
    assert code == 0, printed
    assert re.search(r"error: rank 1: memory ran out in step \d, in micro-batches of up to \d+ tokens", printed), printed
    assert "starting again in smaller micro-batches: going on from the last checkpoint" in printed
    assert "memory ran out before: micro-batches have at most 80 tokens now, instead of 160" in printed
    assert printed.count("starting again") == 1 and "going on from" in printed
    assert project.losses("smaller") == pytest.approx(project.losses("whole"), rel=1e-5)
    assert not (project.folder / "runs/smaller/memory.json").exists()


@pytest.mark.slow
def test_where_that_is_not_wanted_the_run_ends(project: Project) -> None:
    two = ("parallel={strategy: fsdp, processes: 2}", "recovery.out_of_memory=stop")
    code, printed = project.run(*two, ROOM="1:100")
    assert code == 1 and "starting again" not in printed, printed
    assert not (project.folder / "runs/first/memory.json").exists()
    assert project.run(*two)[0] == 0


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_traceback_is_shown_once(project: Project, rank: int) -> None:
    code, printed = project.run("parallel.processes=2", FAULT=f"{rank}:8:raise")
    assert code == 1, printed
    assert printed.count("ZeroDivisionError: a fault of the test") == 1 and f"error: rank {rank} (pid " in printed
    assert "the same command goes on from the last checkpoint" in printed
    assert project.run("parallel.processes=2")[0] == 0


@pytest.mark.parametrize(
    ("rank", "how"), [(1, "stop"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "stop"), (0, "sleep"), (1, "sleep")))]
)
def test_a_rank_that_hangs_is_named(project: Project, rank: int, how: str) -> None:
    code, printed = project.run("parallel.processes=2", "parallel.timeout=10s", FAULT=f"{rank}:8:{how}")
    assert code == 1, printed
    assert printed.count(f"error: rank {rank} does not answer") == 1, printed
    assert f"rank {1 - rank} (pid " in printed and "waits in all_reduce" in printed
    logs = project.folder / "runs/first/logs"
    assert "all_reduce" in (logs / f"stacks-rank-{1 - rank}.txt").read_text()
    whose = f"where rank {1 - rank} stands" if how == "stop" else "where each one stands"  # a stopped process writes nothing
    assert f"{whose}: " in printed and (logs / f"stacks-rank-{rank}.txt").exists() is (how != "stop"), printed
    assert project.run("parallel.processes=2")[0] == 0


@pytest.mark.slow
def test_a_killed_launcher_leaves_a_checkpoint_and_no_process(project: Project) -> None:
    process = project.start("parallel.processes=2", "save.every=100st", SLOW="0.5")
    until(has_steps(project, "first", 1))
    ranks = project.ranks(process)
    assert sorted(ranks) == [0, 1]
    process.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()))
    assert list((project.folder / "runs/first/checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", [0.0, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (0.3, 0.8, 1.5))])
def test_stopped_before_there_is_anything_to_save(project: Project, number: signal.Signals, moment: float) -> None:
    process = project.start("parallel.processes=2")
    until(lambda: len(project.ranks(process)) == 2)
    time.sleep(moment)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and "Traceback" not in printed, printed
    assert printed.count(f"stopped by {number.name}") == 1 and "run the same command again to go on" in printed, printed


@pytest.mark.parametrize("moment", [0.8, *(pytest.param(moment / 10, marks=pytest.mark.slow) for moment in range(4, 30, 3))])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_amid_an_import_is_heeded(project: Project, count: int, moment: float) -> None:
    process = project.start(f"parallel.processes={count}", SLOW="0.5")
    time.sleep(moment)
    process.terminate()
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode in (3, -signal.SIGTERM) and "Traceback" not in printed, printed
    assert process.returncode == 3 or not printed  # the command had not begun


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1")
PLAIN = ("--mixed_precision", "no", "--dynamo_backend", "no")


def test_torchrun(project: Project) -> None:
    code, printed = project.run("output=runs/torchrun", launcher=TORCHRUN)
    assert code == 0 and "on 2 x cpu" in printed and "starting" not in printed, printed
    assert project.run("output=runs/one")[0] == 0
    same_outcome(project, "torchrun", "one")


@pytest.mark.slow
def test_accelerate_launch(project: Project) -> None:
    launcher = (*ACCELERATE, *PLAIN, "--multi_gpu", "--main_process_port", str(free_port()))
    code, printed = project.run("output=runs/accelerate", launcher=launcher, ACCELERATE_USE_CPU="true")
    assert code == 0 and "on 2 x cpu" in printed and "starting" not in printed, printed
    assert project.run("output=runs/one")[0] == 0
    same_outcome(project, "accelerate", "one")


def test_accelerate_that_starts_one_process_in_silence_is_refused(project: Project) -> None:
    code, printed = project.run(launcher=(*ACCELERATE, *PLAIN, "--cpu"))
    assert code != 0 and "accelerate launch was asked for several processes and has started only this one" in printed, printed
    assert not (project.folder / "runs").exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a cable between them: (name, address)."""
    names = [f"burnish-{os.getpid()}-{number}" for number in range(2)]
    wires = [f"bv{os.getpid() % 100000}{end}" for end in "ab"]

    def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)

    try:
        if shutil.which("ip") is None or ip("netns", "add", names[0], check=False).returncode:
            pytest.skip("network namespaces are not permitted here")
        ip("netns", "add", names[1])
        if (made := ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1], check=False)).returncode:
            pytest.skip(f"no virtual cable here: {made.stderr.strip()}")
        for number, (name, wire) in enumerate(zip(names, wires, strict=True)):
            ip("link", "set", wire, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", wire)
            ip("-n", name, "link", "set", wire, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [(name, f"10.77.0.{number + 1}") for number, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_machines_with_addresses_of_their_own(project: Project, machines: list[tuple[str, str]]) -> None:
    wires = [subprocess.run(["ip", "-n", name, "-o", "link"], capture_output=True, text=True, check=True).stdout for name, _ in machines]
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0][1]}:29511", "--rdzv-id", "7")
    started: list[subprocess.Popen[str]] = []
    for number, (name, address) in enumerate(machines):
        launcher = ("ip", "netns", "exec", name, *TORCHRUN[:3], "--nnodes", "2", "--nproc-per-node", "1", *rendezvous)
        wire = re.search(r"\d+: (bv\w+)", wires[number])
        assert wire is not None
        cache = f"data.cache=./cache-{number}"  # as on machines whose disks are their own
        # The name of this machine belongs to neither address, so torchrun is told who keeps the rendezvous.
        more = ("--local-addr", address, "--rdzv-conf", f"is_host={number == 0}")
        started.append(
            project.start("output=runs/far", cache, launcher=(*launcher, *more), GLOO_SOCKET_IFNAME=wire[1], HOME=str(project.folder))
        )
    printed = [process.communicate(timeout=PATIENCE)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    assert "".join(printed).count("on 2 x cpu") == 1
    assert project.run("output=runs/one")[0] == 0
    same_outcome(project, "far", "one")
