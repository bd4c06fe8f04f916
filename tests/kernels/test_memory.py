"""No kernel may write the batch × dictionary matrix, forward or backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, FEATURES = 4096, 32768
DENSE_MIB = ROWS * FEATURES * 4 / 2**20

# ru_maxrss of a child begins with its parent's peak, so the peak is read from the process itself. It never falls: the
# eager version comes last.
_SCRIPT = """
import json, re, sys
import torch
import saerec_fast as fast
import saerec_fast.sae

rows, n, d, k = ROWS, FEATURES, 64, 32
torch.manual_seed(0)

def tensors(rows, n):
    return [torch.randn(rows, d), torch.randn(n, d) / 8, torch.randn(n) / 8, torch.randn(d) / 8, torch.randn(n, d) / 8]

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

edits = [fast.Edit(7, "set", 1.0), fast.Edit(9, "scale", 2.0)]

def linear_topk(x, W_enc, b_enc, b_dec, W_dec):
    return fast.linear_topk(x, W_enc, b_enc, k=k, backend="cpu").values

def encode_decode(x, W_enc, b_enc, b_dec, W_dec):
    return fast.decode_sparse(fast.encode_topk(x, W_enc, b_enc, b_dec, k=k, backend="cpu"), W_dec, b_dec, backend="cpu")

def steer_topk(*t):
    return fast.steer(*t, fast.TopK(k), fast.SteeringPlan(edits, "reconstruct"), backend="cpu")

def steer_relu(*t):
    return fast.steer(*t, fast.ReLU(), fast.SteeringPlan(edits), backend="cpu")

def reconstruct_topk(*t):
    return fast.reconstruct(*t, fast.TopK(k), backend="cpu")

def reconstruct_relu(x, W_enc, b_enc, b_dec, W_dec):
    return fast.reconstruct(x, W_enc, b_enc - 3.5, b_dec, W_dec, fast.ReLU(), backend="cpu")

def eager(x, W_enc, b_enc, b_dec, W_dec):
    values, indices = torch.addmm(b_enc, x - b_dec, W_enc.T).topk(k)
    return torch.zeros(rows, n).scatter(1, indices, values.relu()) @ W_dec + b_dec

def run(op, inputs):
    op(*inputs)
    with torch.inference_mode():
        op(*inputs)
    if op in ops[:4]:
        leaves = [tensor.requires_grad_() for tensor in inputs]
        op(*leaves).sum().backward()
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_(False)

def step(activation):
    def training_step(x, W_enc, b_enc, b_dec, W_dec):
        sae = fast.sae.SparseAutoencoder(d, len(W_enc), activation)
        with torch.no_grad():
            for parameter, tensor in zip(sae.parameters(), (W_enc, b_enc, W_dec, b_dec)):
                parameter.copy_(tensor)
        fast.sae.training_step(sae, x.detach())
    training_step.__name__ = repr(activation)
    return training_step

ops = [linear_topk, encode_decode, steer_topk, steer_relu, reconstruct_topk, reconstruct_relu]
ops += [step(fast.TopK(k)), step(fast.BatchTopK(k))]
for op in ops:  # what PyTorch loads on first use is not the kernels'
    run(op, tensors(16, 100))
inputs = tensors(rows, n)
baseline, growth = peak(), {}
for op in [*ops, eager]:
    run(op, inputs)
    growth[op.__name__] = peak() - baseline
print(json.dumps(growth))
"""


_CATALOGUE_SCRIPT = """
import json, re
import torch
import saerec_fast as fast

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

rows, n, d, k = 512, 200_000, 64, 100
x, weight = torch.randn(rows, d), torch.randn(n, d)
exclude = [range(i, i + 50) for i in range(rows)]
growth = {}
fast.linear_topk(x[:, :8], weight[:1000, :8], k=k, backend="cpu")
baseline = peak()
packed = fast.pack_weights(weight)
growth["packing"] = peak() - baseline
baseline = peak()
fast.linear_topk(x, weight, k=k, packed=packed, exclude=exclude, backend="cpu")
growth["packed"] = peak() - baseline
fast.linear_topk(x, weight, k=k, backend="cpu")
growth["packed on the fly"] = peak() - baseline
torch.mm(x, weight.T)
growth["dense"] = peak() - baseline
print(json.dumps(growth))
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def growth_of(script: str) -> dict[str, float]:
    """What a fresh process that runs the script reports, MiB by name."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_proc
def test_no_batch_by_dictionary_matrix() -> None:
    growth = growth_of(_SCRIPT.replace("ROWS", str(ROWS)).replace("FEATURES", str(FEATURES)))
    # If the measurement did not work, the eager version would not show either.
    assert growth.pop("eager") > DENSE_MIB
    assert all(mib < 100 for mib in growth.values()), growth


@needs_proc
def test_no_batch_by_catalogue_matrix() -> None:
    growth = growth_of(_CATALOGUE_SCRIPT)
    dense, codes = 512 * 200_000 * 4 / 2**20, 200_000 * 64 / 2**20
    assert growth.pop("dense") > dense
    assert growth["packing"] < codes + 20
    assert growth["packed"] < 30
    assert growth["packed on the fly"] < codes + 50
