"""`burnish doctor`: versions, devices, and what each optional part needs."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from burnish.cli.parts import parts, version

PACKAGES = ("burnish", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "datasets", "pyarrow", "pydantic")
CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16", "asimd": "NEON", "bf16": "bf16"}
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Processor:
    """The CPU as this process may use it."""

    name: str
    cores: int
    memory_gib: float
    features: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU or its like."""

    name: str
    memory_gib: float
    free_gib: float
    bfloat16: bool


def main(*, as_json: bool = False) -> None:
    """Prints what is installed and what the machine has."""
    found = examine()
    print(json.dumps(found, indent=2) if as_json else _text(found))


def examine() -> dict[str, Any]:
    """The document of `--json`. A broken installation is reported in it, never raised."""
    accelerators, problem = _accelerators()
    without_c = None if problem else _without_c()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "cpu": asdict(processor()),
        "accelerators": [asdict(accelerator) for accelerator in accelerators],
        "without_c_kernels": without_c,
        "problems": [problem] if problem else [],
        "parts": [
            {"name": part.extra, "purpose": part.purpose, "installed": part.installed, "packages": part.packages, "install": part.install}
            for part in parts()
        ],
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> Processor:
    """The CPU: its name, the cores and the memory that this process may use, and what speeds up matrix products."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((known.get("flags") or known.get("Features") or "").split())
    return Processor(
        name=known.get("model name") or platform.processor() or platform.machine(),
        cores=_cores(cgroup),
        memory_gib=round(_memory(cgroup) / GIB, 1),
        features=[name for flag, name in CPU_FLAGS.items() if flag in flags],
    )


def _cores(cgroup: Path) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line(cgroup / "cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else cores


def _memory(cgroup: Path) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(cgroup / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _first_line(file: Path) -> str:
    try:
        return file.read_text().partition("\n")[0]
    except OSError:
        return ""


def _accelerators() -> tuple[list[Accelerator], str | None]:
    try:
        import torch  # slow, and the one import that a broken driver or wheel makes fail
    except Exception as error:
        return [], f"torch cannot be imported: {type(error).__name__}: {error}"
    try:
        return [_cuda(torch, index) for index in range(torch.cuda.device_count())] + _mps(torch), None
    except Exception as error:
        return [], f"the GPU cannot be used: {type(error).__name__}: {error}"


def _cuda(torch: Any, index: int) -> Accelerator:
    free, total = torch.cuda.mem_get_info(index)
    capable = torch.cuda.get_device_capability(index) >= (8, 0)
    return Accelerator(torch.cuda.get_device_name(index), round(total / GIB, 1), round(free / GIB, 1), capable)


def _mps(torch: Any) -> list[Accelerator]:
    if not torch.backends.mps.is_available():
        return []
    total = torch.mps.recommended_max_memory()
    return [Accelerator("Apple GPU (MPS)", round(total / GIB, 1), round((total - torch.mps.current_allocated_memory()) / GIB, 1), True)]


def _without_c() -> str | None:
    """Why the C kernels cannot be used; None where they can. Compiles them where nobody has yet."""
    try:
        from burnish.kernels import native

        return native.why_not()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _text(found: dict[str, Any]) -> str:
    cpu, accelerators = found["cpu"], found["accelerators"]
    features = ", ".join(cpu["features"]) or "no matrix extensions known"
    lines = [f"Python {found['python']} on {found['platform']}", "", "Packages"]
    lines += [f"  {name:<14}{number or 'not installed'}" for name, number in found["packages"].items()]
    lines += ["", "Devices", f"  CPU           {cpu['name']}: {cpu['cores']} cores, {cpu['memory_gib']:g} GiB; {features}"]
    lines += [
        f"  GPU {number:<10}{gpu['name']}: {gpu['memory_gib']:g} GiB, {gpu['free_gib']:g} free{', bf16' if gpu['bfloat16'] else ''}"
        for number, gpu in enumerate(accelerators)
    ]
    lines += [] if accelerators else ["  GPU           none: training runs on the CPU"]
    reason = found["without_c_kernels"]
    lines += [f"  C kernels     {f'none, CPUs train slower: {reason}' if reason else 'compiled, and they agree with torch'}"]
    lines += ["", "Optional parts"]
    lines += [f"  {part['name']:<14}{_state(part):<34}{part['purpose']}" for part in found["parts"]]
    return "\n".join(lines + [f"\nproblem: {problem}" for problem in found["problems"]])


def _state(part: dict[str, Any]) -> str:
    if part["installed"]:
        return "installed"
    return part["install"]
