"""The files that start a run on several machines: they are what Slurm, Ray and SkyPilot read, and they say the right command."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from burnish.cli.launch import KINDS, main
from burnish.config.sections import Parallel
from burnish.core.errors import BurnishError, ConfigError
from burnish.engine.launcher import adopt_slurm, tell_ignored

RUN = "model: ./model\ndata: {train: rows.jsonl, max_length: 64, cache: ./cache}\ntrain: {batch_size: 4, steps: 2, precision: float32}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(RUN + "output: runs/my run\n")
    return tmp_path


def text(kind: str, *overrides: str, nodes: int = 2, gpus: int = 4, file: str = "run.yaml") -> str:
    place = Path("written")
    main(kind, Path(file), overrides, nodes=nodes, gpus=gpus, gpu="A100", time="1:30:00", output=place)
    written = place.read_text()
    place.unlink()
    return written


def test_slurm_is_a_sound_script() -> None:
    script = text("slurm", "train.steps=3", "data.train=my rows.jsonl" if Path("my rows.jsonl").exists() else "train.seed=1")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line.startswith("#SBATCH"))
    assert options["nodes"] == "2" and options["ntasks-per-node"] == options["gpus-per-node"] == "4"
    assert options["time"] == "1:30:00" and options["signal"] == "USR1@120" and options["job-name"] == "my-run" and "requeue" in options
    assert "burnish train run.yaml train.steps=3 train.seed=1\n" in script


def test_slurm_without_gpus_asks_for_none() -> None:
    script = text("slurm", "parallel.processes=3", gpus=0)
    assert "gpus" not in script and "--ntasks-per-node=3" in script


def test_what_a_shell_would_take_apart_stays_whole() -> None:
    assert "'data.train=[a.jsonl, b.jsonl]'" in KINDS["slurm"][0](_job(["data.train=[a.jsonl, b.jsonl]"]))


def _job(overrides: list[str]):
    from burnish.cli.launch import Job

    return Job(Path("run.yaml"), overrides, 1, 1, "A100", "1:00", "x", 1, 0, "/runs/x")


def test_ray_is_a_sound_program() -> None:
    tree = ast.parse(text("ray", "train.steps=3", "output=runs/other", "parallel.restarts=5"))
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    arguments = [ast.literal_eval(argument) for argument in calls["burnish.train"].args]
    assert arguments == [str(Path("run.yaml").resolve()), "train.steps=3", "parallel.restarts=5", f"output={Path('runs/other').resolve()}"]
    scaling = {word.arg: ast.literal_eval(word.value) for word in calls["ScalingConfig"].keywords}
    assert scaling == {"num_workers": 8, "use_gpu": True}
    assert ast.unparse(calls["FailureConfig"]) == "FailureConfig(max_failures=5)"


def test_sky_is_a_sound_task() -> None:
    task = YAML(typ="safe", pure=True).load(text("sky", "train.steps=3"))
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": {"A100": 4}} and task["name"] == "burnish-my-run"
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    assert "--nproc-per-node=4" in task["run"] and task["run"].rstrip().endswith("-m burnish train run.yaml train.steps=3")
    assert YAML(typ="safe", pure=True).load(text("sky", gpus=0))["resources"] == {"cpus": "8+"}


def test_sky_wants_the_run_file_below_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(BurnishError, match="is not below"):
        text("sky", file="../run.yaml")


def test_mistakes() -> None:
    with pytest.raises(BurnishError, match="unknown kind 'slrum'; did you mean 'slurm'"):
        text("slrum")
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        text("slurm", "trian.steps=3")
    Path("written").write_text("mine")
    with pytest.raises(BurnishError, match="exists already"):
        text("slurm")
    assert Path("written").read_text() == "mine"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_STEP_NUM_TASKS": "9", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[03-05]"},
            {"WORLD_SIZE": "9", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "20017"},
        ),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a,b[1-2]"}, {"MASTER_ADDR": "a"}),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[7,9]", "MASTER_ADDR": "head"}, {"MASTER_ADDR": "head"}),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[7,9]"}, {"MASTER_ADDR": "n7"}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": None}),  # one task: burnish starts the processes itself
        ({"SLURM_STEP_NUM_TASKS": "2", "RANK": "5", "WORLD_SIZE": "8"}, {"RANK": "5", "WORLD_SIZE": "8"}),  # torchrun below srun
    ],
)
def test_what_srun_says_is_understood(said: dict[str, str], expected: dict[str, str | None]) -> None:
    environ = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "10017", **said}
    adopt_slurm(environ)
    assert {key: environ.get(key) for key in expected} == expected


SRUN = """#!{python}
import os, subprocess, sys
count, command = 2, sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
if os.environ.get("FAIL"):
    command = ["sh", "-c", "exit " + os.environ["FAIL"]]
said = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}}
tasks = [
    subprocess.Popen(command, env={{**os.environ, **said, "SLURM_PROCID": str(n), "SLURM_NODEID": str(n)}}) for n in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def cluster(folder: Path) -> dict[str, str]:
    """An environment with an `srun` that starts two machines as processes, and an `scontrol` that notes what it is asked."""
    programs = folder / "bin"
    programs.mkdir()
    files = {
        "srun": SRUN.format(python=sys.executable),
        "burnish": f'#!/bin/sh\nexec {sys.executable} -m burnish "$@"\n',
        "scontrol": '#!/bin/sh\necho "$@" >> asked\n[ "$1" = show ] && echo localhost\nexit 0\n',
    }
    for name, content in files.items():
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    package = str(Path(__file__).resolve().parents[3] / "src")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    keep = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    more = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return keep | job | more


def test_the_script_trains_on_two_machines(folder: Path, tiny_model: Path, cluster: dict[str, str]) -> None:
    (folder / "model").rmdir()
    shutil.copytree(tiny_model, folder / "model")
    rows = [{"prompt": f"ask {i}", "completion": f"say {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.sh").write_text(text("slurm", gpus=0))
    done = subprocess.run(["bash", "job.sh"], env=cluster, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr and done.stderr.count("training ") == 1
    assert (folder / "runs/my run/model").is_dir() and "requeue" not in (folder / "asked").read_text()


@pytest.mark.parametrize(("code", "requeued"), [(3, True), (2, False), (1, False)])
def test_a_job_that_was_stopped_goes_back_into_the_queue(folder: Path, cluster: dict[str, str], code: int, requeued: bool) -> None:
    (folder / "job.sh").write_text(text("slurm", gpus=0))
    done = subprocess.run(["bash", "job.sh"], env=cluster | {"FAIL": str(code)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert (f"requeue {cluster['SLURM_JOB_ID']}" in (folder / "asked").read_text()) is requeued


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time": "soon"}, "--time: expected minutes"),
        ({"time": "1:2:3:4"}, "--time: expected minutes"),
        ({"gpu": "H100; rm -rf"}, "--gpu: expected a name like H100"),
        ({"output": Path("nowhere/job.sh")}, r"there is no folder nowhere to write job\.sh into"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input_is_one_sentence(kind: str, options: dict[str, object], said: str) -> None:
    settings = {"nodes": 1, "gpus": 1, "gpu": "A100-80GB", "time": "2-12:00", "output": None} | options
    with pytest.raises(BurnishError, match=said):
        main(kind, Path("run.yaml"), (), **settings)  # pyright: ignore[reportArgumentType]


def test_sky_installs_what_the_run_needs_and_says_what_must_be_shared() -> None:
    task = text("sky", "model.quantize=nf4", "adapter=lora", "track=[csv, wandb]")
    assert YAML(typ="safe").load(task)["setup"] == "pip install 'burnish[quant,wandb]'"
    assert "All machines must see" in task and "All machines must see" not in text("sky", nodes=1)
    assert YAML(typ="safe").load(text("sky"))["setup"] == "pip install burnish"


@pytest.mark.parametrize("group", ["parallel.tensor=3", "parallel.context=3", "parallel={strategy: hsdp, shards: 3}"])
def test_groups_must_divide_the_processes_of_the_job(group: str) -> None:
    assert text("slurm", group, gpus=6)
    with pytest.raises(ConfigError, match=r"parallel\.processes: 8"):
        text("slurm", group)


def test_a_number_of_processes_that_a_job_does_not_follow_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ntasks-per-node=4" in text("slurm", "parallel.processes=2")
    assert "parallel.processes: 2 is not followed: there are 4 on each machine" in " ".join(capsys.readouterr().err.split())
    text("slurm", "parallel.processes=4")
    assert "warning" not in capsys.readouterr().err


def test_slurm_says_that_it_does_not_count_restarts() -> None:
    assert "parallel.restarts is not followed here" in text("slurm", "parallel.restarts=3")
    assert "parallel.restarts" not in text("slurm")


def test_keys_that_another_launcher_overrides_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Parallel(processes=4, restarts=2)
    tell_ignored(asked, {"RANK": "0", "WORLD_SIZE": "2"})
    assert "parallel.processes and parallel.restarts not followed" in " ".join(capsys.readouterr().err.split())
    for quiet, environ in ((asked, {"RANK": "1", "WORLD_SIZE": "2"}), (asked, {}), (Parallel(), {"RANK": "0", "WORLD_SIZE": "2"})):
        tell_ignored(quiet, environ)
    tell_ignored(Parallel(processes=4), {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})  # what started them has followed it
    assert capsys.readouterr().err == ""


def test_sky_warns_of_a_run_folder_that_each_machine_has_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    task = text("sky", "output=runs/mine")
    assert "All machines must see one run folder, and runs/mine is in each one's own copy" in task
    assert "the run folder runs/mine would be another one on each machine" in " ".join(capsys.readouterr().err.split())
    for quiet in (text("sky", "output=runs/mine", nodes=1), text("sky", "output=/bucket/mine")):
        assert "own copy" not in quiet
    assert "warning" not in capsys.readouterr().err
