"""Every kernel in use compiles ahead of time for sm_80 and sm_90, in every configuration it can be tuned to: no spills,
shared memory that fits, tensor cores where they are claimed, never tf32, and sums of one order.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
TENSOR_CORES = {80: "mma.sync", 90: "wgmma"}
SCORING = {
    "group_maxima_kernel",
    "emit_kernel",
    "repair_kernel",
    "mark_kernel",
    "fill_kernel",
    "features_kernel",
    "sum_kernel",
}
OTHERS = {
    "bound_kernel",
    "select_kernel",
    "exclude_kernel",
    "folded_bias_kernel",
    "decode_kernel",
    "dot_kernel",
    "gradient_kernel",
    "edit_kernel",
    "apply_kernel",
    "rebuild_kernel",
    "finish_kernel",
}
TUNED = {
    "group_maxima_kernel",
    "emit_kernel",
    "mark_kernel",
    "fill_kernel",
    "sum_kernel",
    "decode_kernel",
    "gradient_kernel",
}
# Whatever its scores round to, the candidates are all that reach the bound.
CHOOSES_TILES = {"group_maxima_kernel"}


# In a process of its own: where triton interprets, it does not compile.
COMPILE = ("env", "-u", "TRITON_INTERPRET", sys.executable, str(Path(__file__).with_name("compile_kernels.py")))


@pytest.mark.parametrize(
    ("capability", "command"),
    [(one, (*COMPILE, str(one))) for one in SHARED_MEMORY],
    ids=[f"sm_{one}" for one in SHARED_MEMORY],
)
def test_kernels_compile(
    capability: int, command: tuple[str, ...], result_of: Callable[[tuple[str, ...]], subprocess.CompletedProcess[str]]
) -> None:
    result = result_of(command)
    assert result.returncode == 0, result.stderr[-4000:]
    kernels: list[dict[str, Any]] = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == SCORING | OTHERS
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= SHARED_MEMORY[capability], kernel
        assert "tf32" not in kernel["instructions"], kernel
        # Subnormal scores have an order too.
        assert ".ftz" not in kernel["instructions"], kernel
        if kernel["kernel"] in SCORING:
            tensor_cores = kernel["states"] in ("*bf16", "*fp16")
            assert (TENSOR_CORES[capability] in kernel["instructions"]) == tensor_cores, kernel
            products = [one for one in kernel["sums"] if "dot" in one]
            assert products, kernel
            assert all(("nvidia_mma" in one) == tensor_cores for one in products), kernel
    configurations = defaultdict(list)
    for kernel in kernels:
        if kernel["case"]:
            configurations[kernel["case"]].append(kernel)
    assert {case[0]["kernel"] for case in configurations.values() if len(case) > 1} == TUNED
    for case in configurations.values():
        assert case[0]["sums"], case
        if case[0]["kernel"] not in CHOOSES_TILES:
            assert all(kernel["sums"] == case[0]["sums"] for kernel in case), case
