"""What is installed, what was chosen and why: ``python -m saerec_fast.info``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import saerec_fast
from saerec_fast import backend


def info() -> dict[str, Any]:
    """Versions, the extension and its tiers, devices, the backend ``auto`` takes and why, threads.

    Every value can be written as JSON; where something is missing, the reason stands in its place.
    """
    return {
        "versions": _versions(),
        "extension": _extension(),
        "devices": {"cpu": _cpu_name(), "cuda": _cuda()},
        "backends": {name: reason or _usable(name) for name, reason in backend.available_backends().items()},
        "auto": {device: _automatic_choice(device) for device in ("cpu", "cuda")},
        "threads": _threads(),
    }


def _versions() -> dict[str, str]:
    versions = {"saerec-fast": saerec_fast.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    try:
        versions["triton"] = importlib.import_module("triton").__version__
    except Exception as error:  # whatever stops it, the reason belongs in the report
        versions["triton"] = f"not usable ({error})"
    return versions


def _extension() -> dict[str, Any]:
    problem = backend.available_backends()["cpu"]
    try:
        from saerec_fast import _C
    except ImportError:
        return {"loaded": False, "reason": problem}
    active, supported = _C.active_isa(), _C.supported_isas()
    forced = os.environ.get(backend.ISA_VARIABLE)
    if problem:
        reason = problem
    elif forced == active:
        reason = f"forced by {backend.ISA_VARIABLE}"
    elif active == supported[-1]:
        reason = "the fastest that this CPU runs"
    else:
        reason = "set by set_isa"
    return {
        "loaded": True,
        "path": _C.__file__,
        "compiler": _C.compiler(),
        "tiers compiled": _C.compiled_isas(),
        "tiers supported": supported,
        "tier chosen": active,
        "reason": reason,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"none: {error}"
    return "none: no device is visible"


def _usable(name: str) -> str:
    return "usable, interpreted on the CPU" if name == "triton" and backend.triton_is_interpreted() else "usable"


def _automatic_choice(device: str) -> str:
    choice = backend.choose(device)
    reasons = backend.available_backends()
    if choice != "reference":
        return choice
    if device == "cuda" and torch.cuda.is_available() and not reasons["triton"]:
        return "reference: the GPU kernels have not run on hardware yet; backend='triton' or 'cuda' runs them"
    wanted = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}[device]
    return "reference: " + "; ".join(f"{name}: {reasons[name]}" for name in wanted if reasons[name])


def _threads() -> dict[str, Any]:
    threads: dict[str, Any] = {"torch": torch.get_num_threads(), "cores": os.cpu_count()}
    try:
        from saerec_fast import _C
    except ImportError:
        return threads
    if not _C.openmp:
        threads["kernels"] = "1: built without OpenMP"
    elif _C.is_serial():
        threads["kernels"] = "1: this process was forked, and OpenMP's threads do not survive that"
    else:
        threads["kernels"] = "as many as torch"
    return threads


def _format(report: dict[str, Any]) -> str:
    lines = []
    for section, entries in report.items():
        lines.append(section)
        for name, value in entries.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            lines.append(f"  {name:<18}{text}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(_format(info()))
