"""The page on serving."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_first_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(example, str(PAGE), "exec"), {})
    plain, steered, unknown, reasons = capsys.readouterr().out.strip().split("\n", 3)
    assert plain.count("Film ") == steered.count("Film ") == 5
    assert plain != steered
    assert unknown == "history: 1 unknown items: 999"
    assert reasons.startswith("[812 ")  # the feature that was turned up is the strongest


def test_all_examples_are_python() -> None:
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        compile(example, str(PAGE), "exec")
