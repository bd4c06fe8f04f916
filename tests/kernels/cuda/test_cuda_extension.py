"""The compiled module: how it behaves where it cannot run. `make cuda` builds one and names its folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import pytest
import torch

from saerec_fast.kernels import cuda


@pytest.fixture
def module(lacking: Callable[[str], NoReturn]) -> ModuleType:
    folder = os.environ.get("SAEREC_CUDA_MODULE")
    if folder is None:
        if cuda._extension is None:
            lacking("no compiled module: `make cuda`")
        return cuda._extension
    (path,) = Path(folder).glob("saerec_fast/_cuda*.so")
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_module_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_extension", None)
    monkeypatch.setattr(cuda, "_import_problem", "not built")
    assert cuda.available() == "not built"


@pytest.mark.parametrize(
    ("devices", "capability", "reason"),
    [
        (0, (9, 0), "the CUDA runtime sees no device (too old)"),
        (1, (7, 5), "the current device has 7.5"),
        (1, (8, 0), ""),
    ],
)
def test_availability(monkeypatch: pytest.MonkeyPatch, devices: int, capability: tuple[int, int], reason: str) -> None:
    monkeypatch.setattr(cuda, "_extension", SimpleNamespace(device_count=lambda: (devices, "too old")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cuda.available().endswith(reason)
    assert bool(cuda.available()) == bool(reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_there_are_reasons_and_errors(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, reason = module.device_count()
    assert devices == 0
    assert reason
    matrix = (0, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="CUDA: cudaDeviceGetAttribute: "):
        module.SteerCall(0, 0, matrix, matrix, None, None, matrix, 1, None, True, [0], [1])
    monkeypatch.setattr(cuda, "_extension", module)
    assert cuda.available() == "torch sees no CUDA device"


def test_the_most_edits_are_those_of_the_kernel() -> None:
    header = Path(__file__).parents[3] / "csrc/cuda/steer_kernel.cuh"
    assert f"kMaxEdits = {cuda.MAX_EDITS};" in header.read_text()
