"""Writing is atomic, and reading a damaged file names it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saerec_fast.files import atomic_path, read_json, read_tensors, write_json, write_tensors, write_text


class Crash(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0)
    os.umask(before)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize("old", [None, "old"])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, old: str | None) -> None:
    target = tmp_path / "result.json"
    if old is not None:
        target.write_text(old)

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise Crash

    with pytest.raises(Crash):
        write()
    assert names(tmp_path) == ([] if old is None else ["result.json"])
    assert old is None or target.read_text() == old


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path  # on the same file system, so that it can be renamed
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["result.json"]


def test_a_block_may_replace_the_temporary_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "result") as temporary:
        temporary.unlink()
        temporary.write_text("new")
    assert (tmp_path / "result").read_text() == "new"


def test_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


def test_a_target_that_is_a_folder_is_an_error_and_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_text(tmp_path / "taken", "text")
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_new_file(
    tmp_path: Path, umask: Callable[[int], None], mask: int, expected: int
) -> None:
    umask(mask)
    write_text(tmp_path / "ours", "text")
    (tmp_path / "plain").write_text("text")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes == [expected, expected]
    assert os.umask(mask) == mask  # left as it was


def test_json_round_trip(tmp_path: Path) -> None:
    data = {"title": "Amélie – 愛", "list": [1, 2.5, None, True], "nested": {"a": []}}
    write_json(tmp_path / "data.json", data)
    assert read_json(tmp_path / "data.json") == data
    assert (tmp_path / "data.json").read_bytes().endswith(b"}\n")
    assert "愛".encode() in (tmp_path / "data.json").read_bytes()


@pytest.mark.parametrize("data", [float("nan"), {"share": float("inf")}, {"object": object()}])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "data.json"
    write_json(path, "old")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, data)
    assert read_json(path) == "old"
    assert names(tmp_path) == ["data.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"{'a': 1}"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json: not valid json"):
        read_json(path)


def test_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "plain": base.clone(),
        "transposed": base.T,
        "half": base[:, ::2].bfloat16(),
        "learnt": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2),
    }
    write_tensors(tmp_path / "weights.safetensors", tensors)
    back = read_tensors(tmp_path / "weights.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
        assert not back[name].requires_grad
    assert names(tmp_path) == ["weights.safetensors"]


def test_tensors_that_cannot_be_saved_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    shared = torch.zeros(2)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared})
    assert read_tensors(path)["a"].tolist() == [1.0, 1.0]
    assert names(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text"])
def test_damaged_tensors_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.safetensors"
    write_tensors(path, {"a": torch.arange(100.0)})
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:-1],
            "header": b"\xff" * 8 + content[8:],
            "text": b"not a file of tensors at all",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"broken\.safetensors: not a complete safetensors file"):
        read_tensors(path)


def test_missing_files_are_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")
