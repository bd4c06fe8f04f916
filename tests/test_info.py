from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from saerec_fast import _C, backend
from saerec_fast.info import info


def run_python(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    return result.stdout


def info_in_a_new_process(**environment: str) -> dict:
    code = "import json; from saerec_fast.info import info; print(json.dumps(info()))"
    return json.loads(run_python("-c", code, **environment))


def test_reports_what_is_there() -> None:
    report = info()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"] == torch.__version__
    assert report["extension"]["loaded"]
    assert report["extension"]["tiers supported"] == _C.supported_isas()
    assert report["backends"].keys() == backend.available_backends().keys()
    assert report["auto"]["cpu"] == "cpu"
    assert report["threads"]["torch"] == torch.get_num_threads()


def test_printed_table() -> None:
    printed = run_python("-m", "saerec_fast.info")
    for section, entries in info().items():
        assert section in printed
        for name in entries:
            assert f"  {name} " in printed


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_forced_tier(isa: str) -> None:
    extension = info_in_a_new_process(SAEREC_FAST_ISA=isa)["extension"]
    assert extension["tier chosen"] == isa
    assert extension["reason"] == "forced by SAEREC_FAST_ISA"


def test_fastest_tier_unless_forced() -> None:
    extension = info_in_a_new_process(SAEREC_FAST_ISA="")["extension"]
    assert extension["tier chosen"] == _C.supported_isas()[-1]
    assert extension["reason"] == "the fastest that this CPU runs"


def test_unknown_tier_is_named_and_leaves_the_reference() -> None:
    report = info_in_a_new_process(SAEREC_FAST_ISA="mmx")
    assert "'mmx'" in report["extension"]["reason"]
    assert report["auto"]["cpu"].startswith("reference: ")
    assert "'mmx'" in report["auto"]["cpu"]


def test_missing_extension_is_explained() -> None:
    # None in sys.modules makes the import fail, as it does where nothing was compiled.
    code = (
        "import json, sys; sys.modules['saerec_fast._C'] = None\n"
        "import saerec_fast\n"
        "from saerec_fast.info import info\n"
        "print(json.dumps(info()))"
    )
    report = json.loads(run_python("-c", code))
    assert report["extension"]["loaded"] is False
    assert "extension is missing" in report["extension"]["reason"]
    assert report["auto"]["cpu"].startswith("reference: ")


@pytest.mark.skipif(not _C.openmp, reason="without OpenMP the kernels are always serial")
def test_forked_child_says_that_it_is_serial() -> None:
    code = (
        "import os; from saerec_fast.info import info\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print(info()['threads']['kernels'], flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)"
    )
    assert "forked" in run_python("-c", code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU triton is usable")
def test_triton_needs_a_gpu_or_its_interpreter() -> None:
    pytest.importorskip("triton")
    report = info_in_a_new_process(TRITON_INTERPRET="")
    assert "needs a CUDA device" in report["backends"]["triton"]
    assert report["auto"]["cuda"].startswith("reference: ")
    report = info_in_a_new_process(TRITON_INTERPRET="1")
    assert report["backends"]["triton"] == "usable, interpreted on the CPU"
    assert report["auto"]["cpu"] == "cpu"


def test_importing_does_not_load_triton() -> None:
    assert run_python("-c", "import sys, saerec_fast; print('triton' in sys.modules)") == "False\n"


def test_a_named_backend_that_cannot_run_says_why() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import saerec_fast\n"
        "try:\n"
        "    saerec_fast.linear_topk(torch.ones(2, 3), torch.ones(4, 3), k=1, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)"
    )
    assert "'triton' cannot run here: triton cannot be imported" in run_python("-c", code, TRITON_INTERPRET="1")
