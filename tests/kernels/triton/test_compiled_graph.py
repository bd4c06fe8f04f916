"""What torch.compile sees of the Triton operators, on tensors that are CUDA tensors in name only: needs no GPU.

In a process of its own: the stand-in for a GPU's driver stays in force once it is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")

TRACE = """
import json
import torch
import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import saerec_fast.ops


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def calls(function, *arguments):
    graph = aot_export_joint_simple(function, arguments, trace_joint=False).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


found = {}
n, d, k, rows = 200, 24, 5, 6
for namespace in ("saerec_fast_triton", "saerec_fast_cuda"):
    ops = getattr(torch.ops, namespace)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight, bias = empty(rows, d), empty(n, d), empty(n)
        offsets, ids = empty(rows + 1, dtype=torch.int64), empty(rows * k, dtype=torch.int32)
        values, chosen = empty(rows * k), empty(3, dtype=torch.int64)
        found[namespace] = {
            "decode_sparse": calls(lambda *a: [ops.decode_sparse(*a, None)], offsets, ids, values, weight),
            "encode_features": calls(
                lambda *a: [ops.encode_features(*a)], x, weight, bias, empty(d), empty(1), chosen
            ),
            "sparse_dot": calls(lambda *a: [ops.sparse_dot(*a)], offsets, ids, x, weight),
            "sparse_weight_gradient": calls(
                lambda *a: list(ops.sparse_weight_gradient(*a, None, n)), offsets, ids, values, x
            ),
            "encode_topk": calls(lambda *a: list(ops.encode_topk(*a, None, k, None)), x, weight, bias),
        }
print(json.dumps(found))
"""


def test_kernels_are_seen_where_that_costs_no_copies() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for namespace, found in json.loads(result.stdout.splitlines()[-1]).items():
        whole = found.pop("encode_topk")
        assert [call for call in whole if "saerec" in call] == [f"{namespace}.encode_topk.default"]
        assert not any("triton_kernel" in call for call in whole)
        for name, calls in found.items():
            assert calls.count("triton_kernel_wrapper_functional") == 1, (name, calls)
            assert not any("saerec" in call or "copy" in call or "clone" in call for call in calls), (name, calls)
