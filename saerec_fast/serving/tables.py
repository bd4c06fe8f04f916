"""Tables of requests in, tables of answers out: dicts of columns, or what pyarrow makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

INPUT_COLUMNS = ("history", "edits", "k")


def read_table(table: Any) -> dict[str, list[Any]]:
    """The columns of a table as lists of one length; columns that are not there hold ``None``.

    Args:
        table: a mapping from names to columns, or a pyarrow ``Table`` or ``RecordBatch``.

    Raises:
        TypeError: not a table, or a column that is no sequence.
        ValueError: no ``history``, an unknown or repeated column, or columns of different length.
    """
    columns = _named_columns(table)
    unknown = sorted((name for name in columns if name not in INPUT_COLUMNS), key=repr)
    if unknown or "history" not in columns:
        raise ValueError(
            "columns: expected 'history' and, where wanted, 'edits' and 'k', got "
            + (", ".join(map(repr, columns)) or "none")
        )
    read = {name: _values(name, column) for name, column in columns.items() if name != "k" or not _is_one(column)}
    lengths = {name: len(values) for name, values in read.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns: expected one length, got {lengths}")
    n_rows = lengths["history"]
    return {name: read.get(name, [columns.get(name)] * n_rows) for name in INPUT_COLUMNS}


def write_table(answers: Mapping[str, np.ndarray], like: Any, *, ids_are_text: bool) -> Any:
    """The answers as a table of the kind of ``like``; a mapping gives a dict of object arrays.

    Args:
        answers: object arrays ``(N,)``, of 1-D arrays but for ``error``.
        like: the table of the requests.
        ids_are_text: whether item ids are text rather than integers; an empty column does not show it.
    """
    if not is_arrow(like):
        return dict(answers)
    import pyarrow as pa

    types = {
        "items": pa.list_(pa.string() if ids_are_text else pa.int64()),
        "titles": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "features": pa.list_(pa.int64()),
        "feature_values": pa.list_(pa.float32()),
        "feature_names": pa.list_(pa.string()),
        "error": pa.string(),
    }
    arrays = {
        name: pa.array(
            [value.tolist() if isinstance(value, np.ndarray) else value for value in column], type=types[name]
        )
        for name, column in answers.items()
    }
    return pa.record_batch(arrays) if isinstance(like, pa.RecordBatch) else pa.table(arrays)


def is_arrow(value: Any) -> bool:
    """Whether this is pyarrow's, which is not imported to find out."""
    return type(value).__module__.partition(".")[0] == "pyarrow"


def _named_columns(table: Any) -> dict[Any, Any]:
    if isinstance(table, Mapping):
        return dict(table)
    if is_arrow(table) and hasattr(table, "schema") and hasattr(table, "column"):
        names = table.schema.names
        if len(set(names)) < len(names):
            raise ValueError(f"columns: expected each name once, got {names}")
        return {name: table.column(place) for place, name in enumerate(names)}
    raise TypeError(
        f"columns: expected a mapping from names to columns, or a pyarrow table or record batch, "
        f"got {type(table).__name__}"
    )


def _is_one(column: Any) -> bool:
    """Whether this is one number for all rows."""
    return isinstance(column, (int, np.integer)) or column is None


def _values(name: str, column: Any) -> list[Any]:
    if is_arrow(column) and hasattr(column, "to_pylist"):
        values: list[Any] = column.to_pylist()
        return values
    is_sequence = isinstance(column, Sequence) or (hasattr(column, "__len__") and hasattr(column, "__iter__"))
    if (
        not is_sequence
        or isinstance(column, (str, bytes, Mapping, set, frozenset))
        or (isinstance(column, np.ndarray) and not column.ndim)
    ):
        raise TypeError(f"{name}: expected a column, one entry per row, got {type(column).__name__}")
    return list(column)
