from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saerec_fast

ROOT = Path(__file__).parents[1]


def test_importing_loads_no_extra() -> None:
    extras = "transformers polars matplotlib jinja2 typer rich sklearn scipy triton"
    # torch itself uses jinja2 in places; only what the import of saerec_fast adds counts.
    code = (
        "import sys, torch, numpy, safetensors; before = set(sys.modules)\n"
        "import saerec_fast, saerec_fast.steering, saerec_fast.sae, saerec_fast.info\n"
        f"print(*(set({extras!r}.split()) & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
    assert result.stderr == ""


def test_public_names() -> None:
    public = {name for name in vars(saerec_fast) if not name.startswith("_")}
    submodules = {path.stem for path in (ROOT / "saerec_fast").iterdir()} - set(saerec_fast.__all__)
    assert set(saerec_fast.__all__) - {"__version__"} == public - submodules
    assert list(saerec_fast.__all__) == sorted(saerec_fast.__all__)


def test_version() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert importlib.metadata.version("saerec-fast") == declared[1]
    assert saerec_fast.__version__ == declared[1]


def test_types_are_advertised() -> None:
    package = importlib.resources.files("saerec_fast")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("_C.pyi").is_file()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_no_data_set_is_tracked() -> None:
    """MovieLens may not be redistributed, and files of that kind have no other place here either."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    data_like = re.compile(r"\.(dat|data|inter|item|parquet|zip|gz|safetensors|npy|npz|whl)$|(^|/)u\.(data|item|user)")
    assert [path for path in tracked.splitlines() if data_like.search(path)] == []
