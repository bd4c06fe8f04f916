"""Compiles what the ops launch, for GPUs that need not be there, and prints one line of JSON per kernel.

The ops run on CPU tensors with every launch recorded instead of made, so that what is compiled is what is in use:
types, constants, warps, stages, and what triton concludes from the values of arguments. Kernels that are tuned are
recorded in all their configurations.

    python compile_kernels.py 80
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saerec_fast.kernels.triton import launch as launching

KERNEL_FILES = (
    "scores",
    "linear_topk",
    "encode_topk",
    "encode_threshold",
    "encode_features",
    "decode_sparse",
    "reconstruct",
    "reconstruct_threshold",
    "sparse_dot",
    "sparse_weight_gradient",
    "steer",
)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CASES = itertools.count()
OPTION_NAMES = ("num_warps", "num_stages", "enable_fp_fusion")


def operate(dtype: torch.dtype, d: int, n: int, k: int, rows: int) -> None:
    """Every op once."""
    ops = {
        name: getattr(importlib.import_module(f"saerec_fast.kernels.triton.{name}"), name) for name in KERNEL_FILES[1:]
    }
    x, W_enc, W_dec = (torch.zeros(size, d, dtype=dtype) for size in (rows, n, n))
    b_enc, b_dec, threshold = torch.zeros(n, dtype=dtype), torch.zeros(d, dtype=dtype), torch.zeros(1)
    offsets, entries = torch.zeros(rows + 1, dtype=torch.int64), rows * k
    indices, values = torch.zeros(entries, dtype=torch.int32), torch.zeros(entries, dtype=dtype)
    ops["linear_topk"](x, W_enc, b_enc, k, None, None)
    ops["linear_topk"](x, W_enc, None, k, offsets, torch.zeros(entries, dtype=torch.int64))
    ops["encode_topk"](x, W_enc, b_enc, b_dec, k)
    ops["encode_threshold"](x, W_enc, b_enc, b_dec, threshold)
    ops["encode_threshold"](x, W_enc, b_enc, b_dec, threshold.expand(n))
    ops["encode_threshold"](x, W_enc, b_enc, b_dec, threshold, capacity=entries)
    ops["encode_features"](x, W_enc, b_enc, b_dec, threshold, torch.zeros(3, dtype=torch.int64))
    ops["decode_sparse"](offsets, indices, values, W_dec, b_dec)
    ops["reconstruct"](x, W_enc, b_enc, b_dec, W_dec, None, k)
    ops["reconstruct"](x, W_enc, b_enc, b_dec, W_dec, threshold, 0)
    ops["sparse_dot"](offsets, indices, x, W_dec)
    ops["sparse_weight_gradient"](offsets, indices, values, x, b_dec, n)
    plan = [3, 5, 7, 3], [0, 1, 4, 2], torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    for rebuilds in (False, True):
        ops["steer"](x, W_enc, b_enc, b_dec, W_dec, None, k, rebuilds, *plan)
        ops["steer"](x, W_enc, b_enc, b_dec, W_dec, threshold, 0, rebuilds, *plan)


def recorded(shapes: list[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """The different kernels that the ops launch at these shapes, by a description of each."""
    jobs: dict[str, dict[str, Any]] = {}

    def record(kernel: Any, grid: Any, *args: Any, case: str = "", **constants: Any) -> None:
        options = {name: constants.pop(name) for name in OPTION_NAMES if name in constants} | launching.OPTIONS
        values = dict(zip(kernel.arg_names, args, strict=False)) | constants
        assert values.keys() == set(kernel.arg_names), (kernel, values.keys())
        signature, constexprs, attrs = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                attrs[(i,)] = [["tt.divisibility", 16]]
            elif name in constants or value == 1:
                signature[name], constexprs[(i,)] = "constexpr", value
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        job = {"kernel": kernel, "signature": signature, "constexprs": constexprs, "attrs": attrs, "options": options}
        described = {name: str(value) for name, value in job.items()} | {"kernel": kernel.__name__}
        jobs.setdefault(json.dumps(described, sort_keys=True), job | {"case": case})

    def record_all(
        kernel: Any, configurations: Any, grid: Any, sizes: Any, *args: Any, appends_to: Any = (), **constants: Any
    ) -> Any:
        case = f"{kernel.__name__} {next(CASES)}"
        for configuration in configurations:
            options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
            record(kernel, None, *args, case=case, **constants, **configuration.kwargs, **options)
        return configurations[0]

    # What no kernel has written must not decide how much is allocated.
    torch.empty = torch.zeros
    for name in KERNEL_FILES:
        module = importlib.import_module(f"saerec_fast.kernels.triton.{name}")
        module.launch = record
        if hasattr(module, "launch_tuned"):
            module.launch_tuned = record_all
    for shape in shapes:
        operate(*shape)
    return jobs


def sums(code: str) -> list[str]:
    """The products and float32 sums in Triton's code for the GPU: shape, and which thread holds and adds what."""
    layouts = dict(re.findall(r"^(#\w+) = (#.*)$", code, re.MULTILINE))
    products = re.findall(r"(tt\.dot|warp_group_dot) .*-> tensor<(\w+), (#\w+)>", code)
    reductions = re.findall(r'(tt\.reduce)".*?\}\) : \(tensor<([0-9x]+f32), (#\w+)>\)', code, re.DOTALL)
    return sorted({f"{name} {shape} {layouts[layout]}" for name, shape, layout in products + reductions})


def compiled(job: dict[str, Any], capability: int) -> dict[str, Any]:
    source = ASTSource(job["kernel"], job["signature"], job["constexprs"], job["attrs"])
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=job["options"])
    ptx = result.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([dump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    x = job["signature"].get("x_ptr", "")
    return {
        "kernel": job["kernel"].__name__,
        "states": x,
        "constants": {job["kernel"].arg_names[i]: value for (i,), value in job["constexprs"].items()},
        "warps": result.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared_bytes": result.metadata.shared,
        "case": job["case"],
        "sums": sums(result.asm["ttgir"]),
        "instructions": [name for name in ("wgmma", "mma.sync", "tf32", ".ftz") if name in ptx],
    }


SHAPES = [
    (torch.bfloat16, 64, 2048, 32, 64),
    (torch.float32, 64, 2048, 32, 64),
]
# The widest states that are held, the dictionaries of docs/gpu.md and the widest selection, in the kernels that this
# changes.
TOP_K_SHAPES = [
    (torch.float16, 64, 2048, 32, 64),
    (torch.bfloat16, 128, 4096, 32, 1024),
    (torch.float32, 16, 2048, 32, 64),
    (torch.bfloat16, 256, 8192, 64, 4096),
    (torch.float32, 512, 32768, 64, 1024),
    (torch.bfloat16, 64, 4096, 512, 64),
]
# Every tile of threshold reconstruction, and batches that go through a large dictionary in one program and in several.
THRESHOLD_SHAPES = [
    (torch.float16, 15, 2048, 1, 64),
    (torch.bfloat16, 128, 4096, 1, 8192),
    (torch.bfloat16, 256, 8192, 1, 64),
    (torch.bfloat16, 512, 32768, 1, 4096),
    (torch.float32, 128, 4096, 1, 64),
    (torch.float32, 512, 32768, 1, 4096),
]


def main() -> None:
    def top_k_alone(dtype: torch.dtype, d: int, n: int, k: int, rows: int) -> None:
        module = importlib.import_module("saerec_fast.kernels.triton.linear_topk")
        module.linear_topk(torch.zeros(rows, d, dtype=dtype), torch.zeros(n, d, dtype=dtype), None, k, None, None)

    def threshold_alone(dtype: torch.dtype, d: int, n: int, _: int, rows: int) -> None:
        x, W_enc, W_dec = (torch.zeros(size, d, dtype=dtype) for size in (rows, n, n))
        b_enc, b_dec, threshold = torch.zeros(n, dtype=dtype), torch.zeros(d, dtype=dtype), torch.zeros(n)
        edits = torch.zeros(3, dtype=torch.int64), torch.zeros(rows, 3), torch.zeros(n, dtype=torch.int8)
        module = importlib.import_module("saerec_fast.kernels.triton.reconstruct_threshold")
        module.reconstruct_threshold(x, W_enc, b_enc, b_dec, W_dec, threshold, edits=edits)
        module = importlib.import_module("saerec_fast.kernels.triton.encode_threshold")
        module.encode_threshold(x, W_enc, b_enc, b_dec, threshold, capacity=rows)

    global operate
    jobs = recorded(SHAPES)
    operate = top_k_alone
    jobs |= recorded(TOP_K_SHAPES)
    operate = threshold_alone
    jobs |= recorded(THRESHOLD_SHAPES)
    for job in jobs.values():
        print(json.dumps(compiled(job, int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
