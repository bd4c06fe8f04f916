"""Hidden states on disk: written once in a stream, read back in batches of bounded memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from saerec_fast.files import read_json, write_json

_VERSION = 1
_META = "meta.json"
_RESERVED = ("version", "complete", "n_rows", "d_model")

# Bytes of hidden states read at once for a statistic, and held by a shuffle.
_BLOCK_BYTES = 8 << 20
_SHUFFLE_BYTES = 64 << 20
_SHUFFLE_BLOCK_ROWS = 256


class Batch(NamedTuple):
    """Some rows of a store.

    Attributes:
        hidden: float32 tensor ``(m, d)``, a copy of its own.
        users: int32 array ``(m,)``.
        items: int32 array ``(m,)``.
    """

    hidden: Tensor
    users: np.ndarray
    items: np.ndarray


class _Moments(NamedTuple):
    column_mean: np.ndarray
    mean: float
    std: float


class ActivationStore:
    """Rows of hidden states with the user and the item each belongs to.

    A folder with ``hidden.npy`` (float32), ``users.npy`` and ``items.npy`` (int32) and ``meta.json``; the arrays are
    memory-mapped, so opening a store reads nothing.

    Args:
        path: the folder.

    Attributes:
        hidden: float32 memory map ``(N, d)``, read only.
        users: int32 memory map ``(N,)``: user of each row.
        items: int32 memory map ``(N,)``: item index at each row's position.
        d_model: width ``d``.
        meta: what was given to :meth:`create` (``site`` among it).

    Raises:
        FileNotFoundError: no store at ``path``.
        ValueError: the store is incomplete (its writer never closed), truncated or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        meta_path = self.path / _META
        if not meta_path.is_file():
            raise FileNotFoundError(f"{self.path}: no activation store here ({_META} is missing)")
        meta = read_json(meta_path)
        if not isinstance(meta, dict) or any(key not in meta for key in _RESERVED):
            raise ValueError(f"{meta_path}: expected the keys {', '.join(_RESERVED)}")
        if meta["version"] != _VERSION:
            raise ValueError(f"{meta_path}: expected version {_VERSION}, got {meta['version']!r}")
        if meta["complete"] is not True:
            raise ValueError(
                f"{self.path}: incomplete activation store: its writer stopped before close(); collect it again"
            )
        n_rows, d_model = meta["n_rows"], meta["d_model"]
        if not (isinstance(n_rows, int) and n_rows >= 0 and isinstance(d_model, int) and d_model >= 1):
            raise ValueError(f"{meta_path}: expected n_rows >= 0 and d_model >= 1, got {n_rows!r} and {d_model!r}")
        self.d_model: int = d_model
        self.hidden = _open_array(self.path / "hidden.npy", np.dtype(np.float32), (n_rows, d_model))
        self.users = _open_array(self.path / "users.npy", np.dtype(np.int32), (n_rows,))
        self.items = _open_array(self.path / "items.npy", np.dtype(np.int32), (n_rows,))
        self.meta: dict[str, Any] = {key: value for key, value in meta.items() if key not in _RESERVED}
        self._moments: _Moments | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], n_rows: int, d_model: int, **meta: Any) -> ActivationStoreWriter:
        """Start a store of ``n_rows`` rows at ``path``, replacing one that is there.

        Args:
            path: the folder; made where it is missing.
            n_rows: how many rows will be appended, ≥ 0.
            d_model: width of a row, ≥ 1.
            **meta: further entries of ``meta.json`` (json values), e.g. ``site="block.0"``.

        Returns:
            The writer, also a context manager. Until its ``close()`` the store cannot be opened.
        """
        return ActivationStoreWriter(path, n_rows, d_model, meta)

    def __len__(self) -> int:
        return int(self.hidden.shape[0])

    def mean_std(self) -> tuple[float, float]:
        """Mean and standard deviation (population) over all numbers of the matrix, in float64, in one streamed pass.

        Raises:
            ValueError: an empty store, or one with values that are not finite.
        """
        moments = self._compute_moments()
        return moments.mean, moments.std

    def column_mean(self) -> np.ndarray:
        """Mean row, float64 ``(d,)``; same pass and same errors as :meth:`mean_std`."""
        return self._compute_moments().column_mean.copy()

    def batches(
        self,
        batch_size: int,
        shuffle_seed: int | Sequence[int] | None = None,
        drop_last: bool = False,
        *,
        start: int = 0,
        buffer_rows: int | None = None,
    ) -> Iterator[Batch]:
        """One pass over the rows.

        A shuffled pass puts the store's blocks of 256 rows into a random order, reads as many of them as a buffer
        holds, and shuffles the rows in it. Memory is bounded by the buffer whatever the size of the store, and a
        store no larger than the buffer is shuffled perfectly. The order depends only on the seed and ``buffer_rows``.

        Args:
            batch_size: rows per batch, ≥ 1.
            shuffle_seed: non-negative integer or several of them; ``None`` (default) keeps the order on disk.
            drop_last: leave out a last batch that is smaller than the others.
            start: index of the first batch to yield; the batches before it are skipped without being read.
            buffer_rows: rows a shuffle holds in memory; 64 MiB of hidden states by default.

        Raises:
            ValueError: ``batch_size`` or ``buffer_rows`` < 1, or ``start`` < 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size}")
        if start < 0:
            raise ValueError(f"start: expected an integer >= 0, got {start}")
        if buffer_rows is None:
            buffer_rows = max(_SHUFFLE_BYTES // (4 * self.d_model), _SHUFFLE_BLOCK_ROWS)
        elif buffer_rows < 1:
            raise ValueError(f"buffer_rows: expected an integer >= 1, got {buffer_rows}")
        if shuffle_seed is None:
            return self._sequential(batch_size, drop_last, start)
        entropy = [shuffle_seed] if isinstance(shuffle_seed, int) else [int(part) for part in shuffle_seed]
        return self._shuffled(batch_size, drop_last, start, entropy, buffer_rows)

    def _sequential(self, batch_size: int, drop_last: bool, start: int) -> Iterator[Batch]:
        for first in range(start * batch_size, len(self), batch_size):
            rows = slice(first, first + batch_size)
            if drop_last and first + batch_size > len(self):
                return
            batch = Batch(
                torch.from_numpy(np.array(self.hidden[rows])), np.array(self.users[rows]), np.array(self.items[rows])
            )
            _let_go(self.hidden)
            yield batch

    def _shuffled(
        self, batch_size: int, drop_last: bool, start: int, entropy: list[int], buffer_rows: int
    ) -> Iterator[Batch]:
        n_rows = len(self)
        block_rows = min(_SHUFFLE_BLOCK_ROWS, buffer_rows)
        n_blocks = -(-n_rows // block_rows)
        blocks_per_chunk = buffer_rows // block_rows
        order = np.random.default_rng([*entropy, 0]).permutation(n_blocks)
        # Each chunk draws from a generator of its own, so that resuming needs none of the chunks before.
        position = 0
        wanted = start * batch_size
        pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        pending_rows = 0
        for chunk, first_block in enumerate(range(0, n_blocks, blocks_per_chunk)):
            blocks = np.sort(order[first_block : first_block + blocks_per_chunk])
            spans = [(int(block) * block_rows, min((int(block) + 1) * block_rows, n_rows)) for block in blocks]
            size = sum(stop - begin for begin, stop in spans)
            skip = min(max(wanted - position, 0), size)
            position += size
            if skip == size:
                continue
            permutation = np.random.default_rng([*entropy, 1, chunk]).permutation(size)
            hidden = _gather(self.hidden, spans, size)
            users, items = _gather(self.users, spans, size), _gather(self.items, spans, size)
            while skip < size:
                rows = permutation[skip : skip + batch_size - pending_rows]
                pending.append((hidden[rows], users[rows], items[rows]))
                pending_rows += len(rows)
                skip += len(rows)
                if pending_rows == batch_size:
                    yield _join(pending)
                    pending, pending_rows = [], 0
        if pending and not drop_last:
            yield _join(pending)

    def _compute_moments(self) -> _Moments:
        if self._moments is not None:
            return self._moments
        if len(self) == 0:
            raise ValueError(f"{self.path}: an empty store has no mean")
        # Per-block means and squared deviations merged pairwise (Chan, Golub, LeVeque 1983): no cancellation.
        step = max(_BLOCK_BYTES // (8 * self.d_model), 1)
        column_mean = np.zeros(self.d_model)
        column_squares = np.zeros(self.d_model)
        for first in range(0, len(self), step):
            block = self.hidden[first : first + step].astype(np.float64)
            block_mean = block.mean(0)
            _let_go(self.hidden)
            block -= block_mean
            delta = block_mean - column_mean
            done = first + len(block)
            column_squares += np.einsum("ij,ij->j", block, block) + delta * delta * (first * len(block) / done)
            column_mean += delta * (len(block) / done)
        if not (np.isfinite(column_mean).all() and np.isfinite(column_squares).all()):
            raise ValueError(f"{self.path / 'hidden.npy'}: expected finite values, got NaN or infinity")
        mean = float(column_mean.mean())
        variance = float((column_squares / len(self) + (column_mean - mean) ** 2).mean())
        self._moments = _Moments(column_mean, mean, variance**0.5)
        return self._moments


class ActivationStoreWriter:
    """Appends rows to a new store; see :meth:`ActivationStore.create`.

    As a context manager it closes the store at the end of the block, and leaves it incomplete after an error.
    """

    def __init__(self, path: str | os.PathLike[str], n_rows: int, d_model: int, meta: dict[str, Any]) -> None:
        if n_rows < 0:
            raise ValueError(f"n_rows: expected an integer >= 0, got {n_rows}")
        if d_model < 1:
            raise ValueError(f"d_model: expected an integer >= 1, got {d_model}")
        reserved = sorted(set(meta) & set(_RESERVED))
        if reserved:
            raise ValueError(f"meta: {', '.join(reserved)} are set by the store itself")
        self.path = Path(path)
        self.n_rows = n_rows
        self.d_model = d_model
        self.n_written = 0
        self._meta = {"version": _VERSION, "complete": False, "n_rows": n_rows, "d_model": d_model, **meta}
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _META, self._meta)
        # Plain appending rather than a writable memory map: dirty pages would count as this process' memory.
        self._files: list[IO[bytes]] = []
        try:
            for name, dtype, shape in (
                ("hidden.npy", np.float32, (n_rows, d_model)),
                ("users.npy", np.int32, (n_rows,)),
                ("items.npy", np.int32, (n_rows,)),
            ):
                file = (self.path / name).open("wb")
                self._files.append(file)
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
        except BaseException:
            self.abort()
            raise

    def append(self, hidden: Tensor | ArrayLike, users: Tensor | ArrayLike, items: Tensor | ArrayLike) -> None:
        """Add rows.

        Args:
            hidden: ``(m, d)``, any floating type; stored as float32.
            users: integers ``(m,)``.
            items: integers ``(m,)``.

        Raises:
            ValueError: shapes that do not fit, more rows than announced, or a closed writer.
        """
        if not self._files:
            raise ValueError(f"{self.path}: the writer is closed")
        rows = _to_array(hidden, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.d_model:
            raise ValueError(f"hidden: expected shape (m, {self.d_model}), got {rows.shape}")
        columns = [_to_array(users, np.int32), _to_array(items, np.int32)]
        for name, column in zip(("users", "items"), columns, strict=True):
            if column.shape != rows.shape[:1]:
                raise ValueError(f"{name}: expected shape ({len(rows)},), got {column.shape}")
        if self.n_written + len(rows) > self.n_rows:
            raise ValueError(f"{self.path}: {self.n_rows} rows were announced, got {self.n_written + len(rows)}")
        for file, array in zip(self._files, [rows, *columns], strict=True):
            file.write(array.data)
        self.n_written += len(rows)

    def close(self) -> None:
        """Finish the store; afterwards it can be opened. Closing twice does nothing.

        Raises:
            ValueError: fewer rows came than were announced; the store stays incomplete.
        """
        if not self._files:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.abort()
        if self.n_written != self.n_rows:
            raise ValueError(f"{self.path}: {self.n_rows} rows were announced, only {self.n_written} came")
        self._meta["complete"] = True
        write_json(self.path / _META, self._meta)

    def abort(self) -> None:
        """Close the files and leave the store incomplete."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> ActivationStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _to_array(values: Tensor | ArrayLike, dtype: type[np.generic]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()
    return np.ascontiguousarray(values, dtype=dtype)


def _open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        # A map of length 0 cannot be made.
        array = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing from the activation store") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected a complete {dtype} array of shape {shape} ({error})") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path}: expected {dtype} of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array


def _gather(source: np.ndarray, spans: list[tuple[int, int]], size: int) -> np.ndarray:
    target = np.empty((size, *source.shape[1:]), source.dtype)
    position = 0
    for begin, stop in spans:
        target[position : position + stop - begin] = source[begin:stop]
        position += stop - begin
    _let_go(source)
    return target


def _let_go(array: np.ndarray) -> None:
    """Take the pages of a memory map that were read off this process; the system keeps them while it has the room."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _join(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    hidden, users, items = (
        parts[0] if len(parts) == 1 else (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    )
    return Batch(torch.from_numpy(hidden), users, items)
