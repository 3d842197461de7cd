"""The cache of compiled kernels, and what happens where nothing can be compiled. Most tests compile one small function."""

from __future__ import annotations

import ctypes
import inspect
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from burnish.kernels import native
from burnish.kernels.native import build, check, ops

pytestmark = pytest.mark.skipif(not native.ready(), reason=native.why_not() or "")

SOURCE = """
static int busy(void) { int n = 0;
#pragma omp parallel for reduction(+ : n)
for (int i = 0; i < 42; i++) n++;
return n; }
__attribute__((visibility("default"))) int answer(void) { return busy(); }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources with one small file, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.c").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is compiled from now on."""
    files: list[Path] = []
    real = build.compile_library

    def record(compiler: list[str], file: Path) -> None:
        files.append(file)
        real(compiler, file)

    monkeypatch.setattr(build, "compile_library", record)
    return files


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/burnish/native").iterdir())


def test_the_second_load_compiles_nothing(sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    assert build.load().answer() == 42 and build.load().answer() == 42
    assert len(compiled) == 1 and cached(tmp_path) == compiled  # and no scratch file is left
    assert (tmp_path / "cache/burnish/native").stat().st_mode & 0o777 == 0o700 and compiled[0].stat().st_mode & 0o777 == 0o700


def test_a_corrupt_file_is_built_again(sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache/burnish/native"
    folder.mkdir(mode=0o700, parents=True)
    file = folder / f"{build._key(build._compiler())}.so"
    file.write_bytes(b"not a library")
    file.chmod(0o700)
    assert build.load().answer() == 42 and compiled == [file] and file.stat().st_size > 1000


@pytest.mark.parametrize("mode", [0o722, 0o770])
def test_a_file_that_others_may_write_is_not_loaded(mode: int, sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    build.load()
    compiled[0].chmod(mode)
    build.load()
    assert len(compiled) == 2 and compiled[1].stat().st_mode & 0o777 == 0o700


def test_a_link_is_not_loaded(sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    build.load()
    elsewhere = tmp_path / "elsewhere.so"
    compiled[0].rename(elsewhere)
    compiled[0].symlink_to(elsewhere)
    build.load()
    assert len(compiled) == 2 and not compiled[0].is_symlink()


def test_a_folder_that_others_may_write_is_not_used(sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache/burnish/native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert build.load().answer() == 42
    assert not list(folder.iterdir()) and not compiled[0].parent.exists()  # built for this process alone


def test_no_cache_folder(sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert build.load().answer() == 42 and not compiled[0].parent.exists()


def test_another_source_or_processor_or_compiler_is_another_file(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = build._compiler()
    keys = [build._key(compiler)]
    (sources / "common.h").write_text("int other;")
    keys.append(build._key(compiler))
    monkeypatch.setattr(build, "_processor", lambda: "a processor with no AVX")
    keys.append(build._key(compiler))
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho another compiler")
    fake.chmod(0o700)
    keys.append(build._key([str(fake)]))
    assert len(set(keys)) == 4 and build._key([str(fake)]) == keys[3]


def test_the_processor_is_its_features(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name : Some CPU\ncpu MHz : 1234.5\nflags : fpu avx2\n\nprocessor : 1\nflags : fpu\n")
    assert build._processor(file) == "model name : Some CPU\nflags : fpu avx2"
    assert isinstance(build._processor(tmp_path / "nowhere"), str)


def load_in_child(queue: multiprocessing.Queue[int]) -> None:
    torch.set_num_threads(1)  # a forked process has no OpenMP threads but believes in those of its parent
    queue.put(build.load().answer())


def test_many_processes_at_once(sources: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=load_in_child, args=(queue,)) for _ in range(4)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert answers == [42] * 4 and [child.exitcode for child in children] == [0] * 4
    assert len(cached(tmp_path)) == 1


def test_a_source_that_does_not_compile(sources: Path, tmp_path: Path) -> None:
    (sources / "broken.c").write_text("int broken(void) { return nothing; }")
    with pytest.raises(build.BuildError, match=r"the C compiler refuses the kernels: .*broken\.c.*nothing"):
        build.load()
    assert cached(tmp_path) == []


def test_a_library_that_cannot_be_loaded(sources: Path) -> None:
    (sources / "missing.c").write_text('int nowhere(void);\n__attribute__((visibility("default"))) int use(void) { return nowhere(); }')
    with pytest.raises(build.BuildError, match="cannot be loaded"):
        build.load()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": ""}, "no C compiler found (cc, gcc or clang)"),
        ({"CC": "nocc -m64"}, "the C compiler named by $CC is not there: nocc"),
        ({"CC": "false"}, "the C compiler refuses the kernels: exit code 1"),
    ],
)
def test_no_compiler_means_not_ready(variables: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(ops, "_library", ops._library.__wrapped__)
    assert native.why_not.__wrapped__() == reason


def test_no_shared_openmp_means_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr(ops, "_library", ops._library.__wrapped__)
    assert "OpenMP" in (native.why_not.__wrapped__() or "")


@pytest.mark.parametrize(
    ("function", "kernel", "output"),
    [
        *((f"rms_norm_{way}", "rms_norm", i) for way, outputs in (("forward", 3), ("backward", 2)) for i in range(outputs)),
        ("rope_apply", "rope", 0),
        ("glu_forward", "glu", 0),
        *(("glu_backward", "glu", i) for i in range(3)),
        *(("head_chunk", "head", i) for i in range(4)),
        *(("attention_forward", "attention", i) for i in range(2)),
        *(("attention_backward", "attention", i) for i in range(4)),
        *(("adamw_flat", "adamw", name) for name in ("param", "m", "v")),
    ],
)
def test_a_wrong_kernel_is_found_out(function: str, kernel: str, output: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a compiler makes of the sources: one result that is two percent off keeps all of them from being used."""
    real = getattr(ops, function)
    names = list(inspect.signature(real).parameters)

    def wrong(*arguments: torch.Tensor, **named: object) -> object:
        result = real(*arguments, **named)
        results = result if isinstance(result, tuple) else (result,)
        touched = results[output] if isinstance(output, int) else arguments[names.index(output)]
        if touched is not None:
            touched.mul_(1.02)
        return result

    monkeypatch.setattr(ops, function, wrong)
    assert check.faults() == [kernel]
    assert native.why_not.__wrapped__() == f"the compiled kernels do not agree with torch: {kernel}"


def test_the_check_draws_none_of_the_users_random_numbers() -> None:
    state = torch.get_rng_state()
    assert check.faults() == [] and torch.equal(torch.get_rng_state(), state)


def test_openmp_is_torchs_own(tmp_path: Path) -> None:
    """In a fresh process: one OpenMP library in memory, and threads that torch's setting rules."""
    code = (
        "import torch, pathlib; from burnish.kernels import native; assert native.ready(), native.why_not()\n"
        "paths = {l.split()[-1] for l in pathlib.Path('/proc/self/maps').read_text().splitlines() if 'omp' in l.split('/')[-1]}\n"
        "print(len([p for p in paths if p.endswith(tuple('0123456789o')) and 'lib' in p]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == "1"


def test_symbols_of_the_kernels_stay_their_own() -> None:
    assert not hasattr(ctypes.CDLL(None), "burnish_adamw")


def test_processes_that_want_it_at_once_build_it_once(sources: Path, compiled: list[Path], tmp_path: Path) -> None:
    started = threading.Barrier(4)

    def want() -> int:
        started.wait(60)
        return build.load().answer()

    with ThreadPoolExecutor(4) as pool:
        assert [job.result(60) for job in [pool.submit(want) for _ in range(4)]] == [42] * 4
    assert len(compiled) == 1 and cached(tmp_path) == compiled
