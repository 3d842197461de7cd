"""Compiles the C sources beside this file, once for each processor and compiler, and loads what came out.

The sources are plain C with OpenMP loops. They are compiled with -fopenmp but linked without it, so that the OpenMP symbols resolve
to the library that torch itself has loaded: the loops then run on torch's threads, and no second pool spins beside them. Where torch
has another kind of OpenMP (macOS, Windows) nothing is compiled.

The result lies in `$XDG_CACHE_HOME/burnish/native` (by default `~/.cache/burnish/native`) under a name that hashes the sources, the flags,
the compiler's version and the processor's features: a home folder shared by unlike machines holds one file for each. A file is written
beside its place and renamed, and processes that want it at the same time let one of them build it. It is loaded only if it belongs to this
user and nobody else may write it or its folder. Where no such folder can be had, the library is built for this process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import torch

FLAGS = (
    *("-std=c11", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-strict-aliasing"),
    # Exact where torch is: no -ffast-math (NaN and infinities are kept), and no multiply-add that torch would round in two steps.
    *("-fno-thread-jumps", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
FUSED = ("-ffp-contract=fast",)
"""After FLAGS, for sources whose sums are their own, so that there are no separate operations of torch to agree with bit for bit."""

_FUSED_SOURCES = frozenset({"attention_forward.c", "attention_backward.c"})
SOURCES = Path(__file__).parent
_TIMEOUT = 120  # seconds for the compiler, on a machine that is very busy


class BuildError(Exception):
    """Why there are no C kernels here, in one sentence."""


def load() -> ctypes.CDLL:
    """The library of C kernels, from the cache or freshly compiled.

    Raises:
        BuildError: It cannot be compiled or loaded here.
    """
    _share_openmp()
    compiler = _compiler()
    with _folder() as folder:
        file = folder / f"{_key(compiler)}.so"
        if _is_ours(file):
            try:
                return _open(file)
            except OSError:
                file.unlink(missing_ok=True)  # torn or of another system: built again
        with _turn(file):
            if not _is_ours(file):
                compile_library(compiler, file)
        try:
            return _open(file)
        except OSError as error:
            raise BuildError(f"the compiled kernels cannot be loaded ({error})") from error


def compile_library(compiler: list[str], file: Path) -> None:
    """Compiles every source at once, one process each, and links them into `file`, which appears whole or not at all.

    Raises:
        BuildError: The compiler cannot be run, refuses, or the disk does.
    """
    sources = sorted(SOURCES.glob("*.c"))
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="build-") as scratch:
            objects = [f"{scratch}/{source.stem}.o" for source in sources]
            jobs = [[*compiler, *_flags(source), "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)]
            _run(jobs)
            linked = Path(scratch) / "kernels.so"
            _run([[*compiler, "-shared", "-o", str(linked), *objects, "-lm"]])
            linked.chmod(0o700)
            linked.replace(file)
    except OSError as error:
        raise BuildError(f"the C kernels cannot be compiled ({error})") from error


def _flags(source: Path) -> tuple[str, ...]:
    return (*FLAGS, *FUSED) if source.name in _FUSED_SOURCES else FLAGS


def _run(commands: list[list[str]]) -> None:
    """Runs all commands at the same time and waits for all of them."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") for command in commands
    ]
    complaints: list[str] = []
    try:
        for job in running:
            output, _ = job.communicate(timeout=_TIMEOUT)
            if job.returncode:
                lines = output.strip().splitlines() or [f"exit code {job.returncode}"]
                complaints.append(next((line for line in lines if "error" in line), lines[0]).strip())
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the C compiler gave no answer within {_TIMEOUT} seconds") from error
    finally:
        for job in running:
            if job.poll() is None:
                job.kill()
                job.communicate()
    if complaints:
        raise BuildError(f"the C compiler refuses the kernels: {complaints[0]}")


def _compiler() -> list[str]:
    """The command of the C compiler: $CC, else cc, gcc or clang."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"the C compiler named by $CC is not there: {chosen[0]}")
        return chosen
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError("no C compiler found (cc, gcc or clang)")
    return [found]


def _key(compiler: list[str]) -> str:
    """A name that is another one wherever the compiled code would be."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_TIMEOUT, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C compiler cannot be run ({error})") from error
    digest = hashlib.sha256(repr((compiler, FLAGS, FUSED, platform.machine(), _processor())).encode() + version)
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:32]


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What -march=native looks at: model and features of the first processor."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    try:
        first = cpuinfo.read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.partition(":")[0].strip() in wanted)


@contextmanager
def _folder() -> Generator[Path]:
    """The cache folder, private to the user; else one that lives as long as the `with` (a loaded library needs its file no more)."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if Path(root).is_absolute() else Path(os.path.expanduser("~")) / ".cache"
    folder = base / "burnish" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = _is_private(folder, stat.S_ISDIR) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if usable:
        yield folder
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix="burnish-native-")
    except OSError as error:
        raise BuildError(f"there is no folder to compile the C kernels in ({error})") from error
    with scratch as name:
        yield Path(name)


@contextmanager
def _turn(file: Path) -> Generator[None]:
    """Waits while another process builds the same file; where locks do not work, several build it, and each is whole.

    The lock's file does not stay. Whoever still waits on it finds the library built.
    """
    lock = filelock.FileLock(f"{file}.lock", timeout=_TIMEOUT)
    with suppress(OSError, filelock.Timeout, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    try:
        return _is_private(file, stat.S_ISREG)
    except OSError:
        return False


def _is_private(path: Path, is_kind: object) -> bool:
    """Whether `path`, itself and no link, is of the kind, belongs to this user and is writable by nobody else."""
    found = path.lstat()
    return callable(is_kind) and bool(is_kind(found.st_mode)) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _open(file: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(file), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def _share_openmp() -> None:
    """Makes the OpenMP symbols of torch's own library visible to the kernels.

    Raises:
        BuildError: torch has none that this code could share.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        symbol = ctypes.CDLL(str(library)).GOMP_parallel  # looked up in what torch itself is linked to
    except (OSError, AttributeError) as error:
        raise BuildError("torch's threads are not those of a GNU-compatible OpenMP, which the C kernels share") from error
    address = ctypes.cast(symbol, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last and path:
            ctypes.CDLL(path[0], mode=os.RTLD_NOW | os.RTLD_GLOBAL)
            return
    raise BuildError("the file of torch's OpenMP library is not known")
