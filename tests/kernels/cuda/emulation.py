"""The CUDA kernels on the CPU: an object with the interface of ``saerec_fast._cuda`` that runs the same kernel code,
and the same choice of launch, thread by thread; see emulation/machine.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[3]
_SOURCES = [
    *sorted((Path(__file__).parent / "emulation").glob("*.cpp")),
    ROOT / "csrc/cuda/steer_launch.cpp",
    ROOT / "csrc/cpu/convert.cpp",
]
_HEADERS = [Path(__file__).parent / "emulation", *(ROOT / "csrc" / name for name in ("include/saerec", "cpu", "cuda"))]
# Out-of-range shifts, misaligned loads and overflows end the process.
_CHECKS = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-static-libubsan"]
_MESSAGE_BYTES = 1000


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> ctypes.CDLL:
    """Compiles the kernels for the CPU, once for each state of their sources."""
    digest = hashlib.sha256(repr((compiler(), _CHECKS)).encode())
    for path in sorted([*_SOURCES, *(p for folder in _HEADERS for p in folder.glob("*.*h"))]):
        digest.update(path.read_bytes())
    library = ROOT / "build" / "emulation" / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        _compile(unfinished)
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    command = [compiler() or "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra"]
    # Fortified longjmp refuses to leave one stack for another, which is how fibers are switched.
    command += ["-Werror", "-U_FORTIFY_SOURCE", *(f"-I{ROOT / 'csrc' / name}" for name in ("include", "cpu", "cuda"))]
    command += [*map(str, _SOURCES), "-o", str(library)]
    checked = subprocess.run([*command, *_CHECKS], capture_output=True, text=True)
    if checked.returncode:  # a compiler without that runtime; its own errors show again
        subprocess.run(command, check=True)


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that decide on the shape of a launch; the defaults are those of an H200."""

    capability: int = 90
    multiprocessors: int = 132
    shared_memory: int = 227 * 1024


class Shape(NamedTuple):
    encodes: int
    tile_rows: int
    cluster_blocks: int
    blocks: int
    shared_bytes: int
    workspace_bytes: int


class Emulation:
    """``saerec_fast._cuda`` for tensors on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.device = Device()
        self.seed = 0
        self.shapes: list[Shape] = []  # of the launches so far

    def device_count(self) -> tuple[int, str]:
        return 1, ""

    def SteerCall(self, *args: Any) -> _SteerCall:
        return _SteerCall(self, *args)

    def select(self, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Flags of the k best scores, and the scores as read back from their keys."""
        scores = np.ascontiguousarray(scores, dtype=np.float32)
        selected, values = np.full(len(scores), 2, dtype=np.uint8), np.empty_like(scores)
        self._run(
            "saerec_emulate_selection",
            *(scores.ctypes, ctypes.c_int64(len(scores)), ctypes.c_int64(k), ctypes.c_uint64(self.seed)),
            *(selected.ctypes, values.ctypes),
        )
        return selected, values

    def compact(self, flags: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Items of ``[begin, end)`` whose flag is set, in the order in which they are placed."""
        places = np.full(len(flags) + 1, -1, dtype=np.int32)
        arguments = (ctypes.c_int64(begin), ctypes.c_int64(end), ctypes.c_uint64(self.seed))
        self._run("saerec_emulate_compaction", flags.ctypes, *arguments, places.ctypes)
        return places[1 : 1 + places[0]]

    def _run(self, function: str, *args: Any) -> None:
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        converted = [arg.data_as(ctypes.c_void_p) if hasattr(arg, "data_as") else arg for arg in args]
        if getattr(self._library, function)(*converted, message):
            raise RuntimeError(message.value.decode())


class _SteerCall:
    def __init__(self, emulation: Emulation, _: int, dtype: int, *args: Any) -> None:
        x, weight_enc, bias, shift, weight_dec, k, thresholds, reconstruct, features, ops = args
        self._emulation = emulation
        self._features = np.array(features, dtype=np.int64)
        self._ops = np.array(ops, dtype=np.int64)
        absent = (0, 0, 0)
        self._words = [dtype, *x, *weight_enc, *(bias or absent), *(shift or absent), *weight_dec, k]
        self._words += [*(thresholds or absent), reconstruct, len(features)]
        self._words += [self._features.ctypes.data, self._ops.ctypes.data]
        self._shape = x[1:3]

    def _flat(self, *rest: Iterable[int]) -> Any:
        device = self._emulation.device
        words = [*self._words, *rest, device.capability, device.multiprocessors, device.shared_memory]
        return np.array(words, dtype=np.int64).ctypes

    def _plan(self) -> Shape:
        shape = np.zeros(len(Shape._fields), dtype=np.int64)
        self._emulation._run("saerec_plan_steer", self._flat(0, 0, 0, *[0] * 5), shape.ctypes)
        return Shape(*shape.tolist())

    def problem(self) -> str:
        try:
            self._plan()
        except RuntimeError as error:
            return str(error)
        return ""

    def workspace_bytes(self) -> int:
        try:
            return self._plan().workspace_bytes
        except RuntimeError as error:
            raise ValueError(*error.args) from None  # as pybind11 translates std::invalid_argument

    def launch(
        self, values: int, row_stride: int, mask: int, out: tuple[int, ...], workspace: int, size: int, _: int
    ) -> None:
        self._emulation.shapes.append(self._plan())
        assert size == self._emulation.shapes[-1].workspace_bytes
        self._emulation._run(
            "saerec_emulate_steer",
            self._flat(values, row_stride, mask, *out),
            ctypes.c_void_p(workspace),
            ctypes.c_uint64(self._emulation.seed),
        )
