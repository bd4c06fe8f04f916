"""Tests against other libraries run in an environment that has them: `make test-integrations`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
import torch

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect these tests only where this folder, or a file of it, is asked for by name."""
    asked_for = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(HERE in (path, *path.parents) for path in asked_for) else True


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    peers.set_environment()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()
