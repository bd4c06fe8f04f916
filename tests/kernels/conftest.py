from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from saerec_fast import _C

_GUARD = 64
_INTEGER_POISON = 0x5A5A5A5A


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return _INTEGER_POISON & torch.iinfo(dtype).max


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    previous = _C.active_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(previous)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests of threads ask for them; on the small tensors of the others they would only wait for each other."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs start as NaN or a huge id, between sentinels: an element left unwritten or a write outside shows."""
    buffers: list[tuple[torch.Tensor, int]] = []

    def guarded_empty(*shape, dtype: torch.dtype | None = None, **options) -> torch.Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        dtype = dtype or torch.get_default_dtype()
        poison = _poison(dtype)
        buffer = torch.full((size.numel() + 2 * _GUARD,), poison, dtype=dtype, **options)
        buffers.append((buffer, size.numel()))
        return buffer[_GUARD : _GUARD + size.numel()].view(size)

    def guarded_empty_like(like: torch.Tensor, **options) -> torch.Tensor:
        return guarded_empty(like.shape, **{"dtype": like.dtype, "device": like.device, **options})

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", guarded_empty_like)
    yield
    for buffer, numel in buffers:
        guards = torch.cat([buffer[:_GUARD], buffer[_GUARD + numel :]])
        intact = guards.isnan() if guards.is_floating_point() else guards == _poison(guards.dtype)
        assert intact.all(), "a kernel wrote outside its output"
