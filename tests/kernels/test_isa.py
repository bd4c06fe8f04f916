from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from saerec_fast import _C
from saerec_fast.backend import ISA_VARIABLE

_SCRIPT = """
import json
import torch
import saerec_fast as fast
from saerec_fast import _C
from saerec_fast.backend import available_backends, choose

x = torch.ones(2, 3)
result = fast.linear_topk(x, torch.ones(4, 3), k=2)
try:
    fast.linear_topk(x, torch.ones(4, 3), k=2, backend="cpu")
    error = ""
except ValueError as problem:
    error = str(problem)
print(json.dumps({
    "active": _C.active_isa(),
    "reason": available_backends()["cpu"],
    "auto": choose("cpu"),
    "indices": result.indices.tolist(),
    "error": error,
}))
"""


def run_with(isa: str | None) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != ISA_VARIABLE}
    if isa is not None:
        environment[ISA_VARIABLE] = isa
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_the_variable_forces_a_tier(isa: str) -> None:
    seen = run_with(isa)
    assert seen == {"active": isa, "reason": "", "auto": "cpu", "indices": [[0, 1], [0, 1]], "error": ""}


def test_the_fastest_tier_is_the_default() -> None:
    assert run_with(None)["active"] == _C.supported_isas()[-1]


def test_an_unknown_tier_disables_the_kernels_but_not_the_import() -> None:
    seen = run_with("sse9")
    assert seen["reason"] == f"SAEREC_FAST_ISA: expected one of {', '.join(_C.compiled_isas())}, got 'sse9'"
    assert seen["auto"] == "reference"
    assert seen["indices"] == [[0, 1], [0, 1]]
    assert seen["reason"] in seen["error"]
    assert "usable: reference" in seen["error"]


def test_tiers() -> None:
    compiled, supported = _C.compiled_isas(), _C.supported_isas()
    assert compiled[0] == "scalar"
    assert set(supported) <= set(compiled)
    assert supported[0] == "scalar"
    with pytest.raises(ValueError, match="expected one of scalar"):
        _C.set_isa("nothing")
