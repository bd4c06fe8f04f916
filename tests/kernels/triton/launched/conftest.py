from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton_cases
from triton.runtime import interpreter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes of `make gpu`, each runs one share of the tests."""
    share, count = map(int, os.environ.get("SAEREC_TEST_SHARE", "0/1").split("/"))
    items[:] = items[share::count]


@pytest.fixture(autouse=True)
def only_moved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, a kernel that a test reaches with tensors it did not move: a GPU could not read them.

    Backward passes go where their forward pass went.
    """
    run = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **constants: Any) -> None:
        moved = triton_cases.running or torch._C._current_autograd_node() is not None
        assert moved, f"{self.fn.__name__}: launched on the test's own tensors; go through triton_cases.on_device"
        run(self, *args, **constants)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
