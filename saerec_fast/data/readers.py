"""Interaction data as people have it on disk, read into a :class:`Dataset`.

The large files go through polars with only the needed columns parsed. Polars does not say which line it could not
read, so a failure is followed by a second, slower look that finds the line.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

import numpy as np

from saerec_fast.data.dataset import Dataset, ItemTable, is_saved_dataset

try:
    import polars as pl
except ImportError:
    raise ImportError("saerec_fast.data needs polars: pip install 'saerec-fast[study]'") from None

if TYPE_CHECKING:
    import _csv

NO_ATTRIBUTE = frozenset({"", "(no genres listed)", "unknown"})
"""Values that sources write where an item has no attribute."""

USER_NAMES = ("user_id", "user", "uid", "customer_id", "visitor_id", "reviewer_id", "session_id")
ITEM_NAMES = (
    "item_id", "item", "iid", "movie_id", "product_id", "track_id", "song_id", "artist_id", "book_id", "article_id",
    "parent_asin", "asin",
)  # fmt: skip
TIMESTAMP_NAMES = (
    "timestamp", "time", "ts", "datetime", "date", "unix_timestamp", "unix_time", "event_time", "unix_review_time",
    "created_at",
)  # fmt: skip
TITLE_NAMES = (
    "title", "movie_title", "name", "item_name", "item_title", "product_name", "track_name", "song_name", "book_title",
)  # fmt: skip
ATTRIBUTE_NAMES = (
    "genres", "genre", "class", "attributes", "attribute", "categories", "category", "tags", "tag",
)  # fmt: skip

SUPPORTED = """supported are
  - GroupLens folders: ratings.dat + movies.dat (ml-1m, ml-10m), ratings.csv + movies.csv (ml-20m, ml-25m, ml-32m),
    u.data + u.item + u.genre (ml-100k)
  - RecBole atomic files: <name>.inter, with <name>.item beside it
  - sequences.txt (one user a line: user id, then item ids in time order), with movies.dat beside it
  - any .csv, .tsv or .parquet file with user, item and timestamp columns (items_path= names the table of items), or
    a folder with interactions.<csv|tsv|parquet> and items.<csv|tsv|parquet>
  - a folder that Dataset.save wrote"""


@dataclass(frozen=True)
class _Columns:
    """Names the caller gave; None where they are to be guessed."""

    user: str | None
    item: str | None
    timestamp: str | None
    title: str | None
    attribute: str | None
    separator: str | None


@dataclass(frozen=True)
class _Item:
    id: str
    title: str
    attributes: list[str]


def read_dataset(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
    items_path: str | os.PathLike[str] | None = None,
    title_column: str | None = None,
    attribute_column: str | None = None,
    attribute_separator: str | None = None,
) -> Dataset:
    """Read a file or folder of interactions; the format is detected.

    GroupLens folders (``ratings.dat`` + ``movies.dat``, ``ratings.csv`` + ``movies.csv``, ``u.data`` + ``u.item`` +
    ``u.genre``), RecBole atomic files, ``sequences.txt``, any CSV, TSV or Parquet file with user, item and timestamp
    columns, and folders that :meth:`Dataset.save` wrote. A folder that holds nothing but one such folder will do.

    Every interaction counts, whatever its rating. A user's interactions are ordered by time, those of the same time
    as they stand in the source; without timestamps the order of the source is taken for the order in time. Users are
    numbered as they first appear, items as in the table of items (those missing from it at the end). Items that
    nobody interacted with are left out. "(no genres listed)" and "unknown" are not attributes.

    Args:
        path: the file or folder.
        name: name of the data set; by default that of the folder or file.
        user_column, item_column, timestamp_column: columns of the interactions, for formats that name their columns.
            By default guessed from common names. Timestamps are numbers (seconds, or milli-, micro- or nanoseconds
            since 1970, told apart by their size) or dates (UTC where they name no zone).
        items_path: a table of items, for interactions that are a single CSV, TSV or Parquet file.
        title_column, attribute_column: columns of the table of items, guessed by default.
        attribute_separator: what stands between the values of one item, ``|`` by default (a space in RecBole files).
            List columns of Parquet need none.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: an unknown format (the message lists what is supported), a malformed line (names file and line), a
            missing column (names what was looked for and what there is), or no interactions at all.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    columns = _Columns(user_column, item_column, timestamp_column, title_column, attribute_column, attribute_separator)
    table = None if items_path is None else Path(items_path)
    if table is not None and not table.is_file():
        raise FileNotFoundError(f"{table}: no such file")
    reader, place = _detect(source)
    label = name
    if label is None:
        single = place.is_file() and place.stem != "interactions"
        label = place.stem if single else (place if place.is_dir() else place.parent).resolve().name
    if reader is _read_saved:
        return _read_saved(place, name)
    if reader is not _read_table and table is not None:
        raise ValueError(f"{place}: this format brings its own table of items, items_path is for single tables")
    if reader not in (_read_table, _read_recbole):
        given = [key for key, value in vars(columns).items() if value is not None]
        if given:
            raise ValueError(f"{place}: the columns of this format are fixed; leave out {', '.join(given)}")
    if reader is _read_table:
        return _read_table(place, label, columns, table)
    if reader is _read_recbole:
        return _read_recbole(place, label, columns)
    return reader(place, label)


def _detect(source: Path) -> tuple[Callable[..., Dataset], Path]:
    found = _detect_file(source) if source.is_file() else _detect_folder(source)
    if found is None and source.is_dir():
        inner = [entry for entry in sorted(source.iterdir()) if entry.is_dir() and not _is_clutter(entry)]
        candidates = [match for match in map(_detect_folder, inner) if match is not None]
        if len(candidates) == 1:
            return candidates[0]
        if len(candidates) > 1:
            raise ValueError(
                f"{source}: several data sets in this folder ({', '.join(folder.name for folder in inner)}); name one"
            )
    if found is None:
        raise ValueError(f"{source}: not a known format; {SUPPORTED}")
    return found


def _is_clutter(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name == "__MACOSX"


def _detect_file(path: Path) -> tuple[Callable[..., Dataset], Path] | None:
    if path.suffix == ".inter":
        return _read_recbole, path
    if path.name in ("ratings.dat", "u.data", "sequences.txt"):
        return _detect_folder(path.parent)
    if path.suffix in (".csv", ".tsv", ".parquet"):
        return _read_table, path
    return None


def _detect_folder(folder: Path) -> tuple[Callable[..., Dataset], Path] | None:
    if is_saved_dataset(folder):
        return _read_saved, folder
    fixed: list[tuple[Callable[..., Dataset], tuple[str, ...]]] = [
        (_read_dat, ("ratings.dat", "movies.dat")),
        (_read_ratings_csv, ("ratings.csv", "movies.csv")),
        (_read_udata, ("u.data", "u.item", "u.genre")),
    ]
    for reader, names in fixed:
        if (folder / names[0]).is_file():
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ValueError(f"{folder}: {names[0]} is here, but {' and '.join(missing)} is missing")
            return reader, folder
    inter = sorted(folder.glob("*.inter"))
    if len(inter) > 1:
        raise ValueError(f"{folder}: several .inter files ({', '.join(file.name for file in inter)}); name one")
    if inter:
        return _read_recbole, inter[0]
    if (folder / "sequences.txt").is_file():
        return _read_sequences, folder
    tables = [folder / f"interactions{suffix}" for suffix in (".parquet", ".csv", ".tsv")]
    tables = [table for table in tables if table.is_file()]
    if len(tables) > 1:
        raise ValueError(f"{folder}: several tables ({', '.join(table.name for table in tables)}); name one")
    return (_read_table, tables[0]) if tables else None


def _read_saved(folder: Path, name: str | None) -> Dataset:
    dataset = Dataset.load(folder)
    if name is None:
        return dataset
    return replace(dataset, name=name)


def _read_dat(folder: Path, name: str) -> Dataset:
    # Polars separates by one byte: "1::2::3::4" is seven fields, of which every second one is empty.
    path = folder / "ratings.dat"
    fields = ["user", "gap1", "item", "gap2", "rating", "gap3", "timestamp"]
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(fields, pl.Int64)
    schema["rating"] = pl.Boolean

    def explain() -> str | None:
        return _first_bad_line(path, "::", 4, {0: "user", 1: "item", 3: "timestamp"})

    frame = _read_csv(path, explain, separator=":", quote=None, schema=schema, has_header=False)
    if any(frame[gap].null_count() != len(frame) for gap in ("gap1", "gap2", "gap3")):
        raise ValueError(explain() or f"{path}: expected user::item::rating::timestamp")
    frame = _whole(path, frame.select("user", "item", "timestamp"), explain)
    return _assemble(name, path, frame, _movies_dat(folder / "movies.dat"))


def _read_ratings_csv(folder: Path, name: str) -> Dataset:
    path = folder / "ratings.csv"
    header = _header(path, ",")
    wanted = {"user": ("userId",), "item": ("movieId",), "timestamp": ("timestamp",)}
    used = {key: _find_column(path, header, names, None, key) for key, names in wanted.items()}
    positions = {header.index(column): key for key, column in used.items()}
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(header, pl.Boolean)
    schema.update(dict.fromkeys(used.values(), pl.Int64))

    def explain() -> str | None:
        return _first_bad_line(path, ",", len(header), positions, skip=1)

    frame = _read_csv(path, explain, separator=",", quote=None, schema=schema)
    frame = _whole(path, frame.select(**{key: pl.col(column) for key, column in used.items()}), explain)
    items = _items_csv(folder / "movies.csv", _Columns(None, "movieId", None, "title", "genres", "|"))
    return _assemble(name, path, frame, items)


def _read_udata(folder: Path, name: str) -> Dataset:
    path = folder / "u.data"
    schema: dict[str, type[pl.DataType]] = {
        "user": pl.Int64,
        "item": pl.Int64,
        "rating": pl.Boolean,
        "timestamp": pl.Int64,
    }

    def explain() -> str | None:
        return _first_bad_line(path, "\t", 4, {0: "user", 1: "item", 3: "timestamp"})

    frame = _read_csv(path, explain, separator="\t", quote=None, schema=schema, has_header=False)
    frame = _whole(path, frame.select("user", "item", "timestamp"), explain)
    genres: dict[int, str] = {}
    for number, line in _lines(folder / "u.genre"):
        parts = line.split("|")
        if len(parts) != 2 or not parts[1].isdecimal():
            _malformed(folder / "u.genre", number, line, "expected name|index")
        genres[int(parts[1])] = parts[0]
    if sorted(genres) != list(range(len(genres))):
        raise ValueError(f"{folder / 'u.genre'}: the indices are not 0..{len(genres) - 1}")
    items = []
    for number, line in _lines(folder / "u.item"):
        parts = line.split("|")
        flags = parts[5:]
        if len(flags) != len(genres) or not parts[0] or not set(flags) <= {"0", "1"}:
            _malformed(
                folder / "u.item", number, line, f"expected id|title|date|date|url and {len(genres)} flags of 0 or 1"
            )
        items.append(_Item(parts[0], parts[1], [genres[index] for index, flag in enumerate(flags) if flag == "1"]))
    return _assemble(name, path, frame, items)


def _read_sequences(folder: Path, name: str) -> Dataset:
    path, movies = folder / "sequences.txt", folder / "movies.dat"
    items = _movies_dat(movies) if movies.is_file() else None
    known = None if items is None else {item.id for item in items}
    codes: dict[str, int] = {}
    users: dict[str, int] = {}
    lengths, positions = array("q"), array("i")
    for number, line in _lines(path):
        user, *sequence = line.split()
        if not sequence:
            _malformed(path, number, line, "expected a user id and at least one item id")
        if users.setdefault(user, number) != number:
            _malformed(path, number, line, f"user {user} has already appeared in line {users[user]}")
        lengths.append(len(sequence))
        for item in sequence:
            code = codes.get(item)
            if code is None:
                if known is not None and item not in known:
                    _malformed(path, number, line, f"item {item!r} is not in {movies.name}")
                code = codes[item] = len(codes)
            positions.append(code)
    if not users:
        raise ValueError(f"{path}: no interactions")
    table, new_index = _item_table(path, list(codes), items)
    return Dataset(
        name,
        np.array(list(users)),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(np.frombuffer(lengths, np.int64))]),
        new_index[np.frombuffer(positions, np.int32)],
        None,
        table,
    )


def _read_recbole(path: Path, name: str, columns: _Columns) -> Dataset:
    header = [column.partition(":")[0] for column in _header(path, "\t")]
    frame = _interactions_text(path, "\t", None, header, columns)
    items_path = path.with_suffix(".item")
    items = _items_recbole(items_path, columns) if items_path.is_file() else None
    return _assemble(name, path, frame, items)


def _read_table(path: Path, name: str, columns: _Columns, items_path: Path | None) -> Dataset:
    if path.suffix == ".parquet":
        with _unreadable_parquet(path):
            header = list(pl.read_parquet_schema(path))
        used = _interaction_columns(path, header, columns)
        with _unreadable_parquet(path):
            frame = pl.read_parquet(path, columns=list(used.values()))
        frame = frame.select(**{key: pl.col(column) for key, column in used.items()})
        frame = _checked(frame, lambda row: f"{path}, row {row + 1}")
    else:
        separator = _separator(path)
        frame = _interactions_text(path, separator, '"', _header(path, separator), columns)
    if items_path is None and path.stem == "interactions":
        tables = [path.with_name(f"items{suffix}") for suffix in (".parquet", ".csv", ".tsv")]
        tables = [table for table in tables if table.is_file()]
        if len(tables) > 1:
            raise ValueError(f"{path.parent}: several tables of items ({', '.join(table.name for table in tables)})")
        items_path = tables[0] if tables else None
    items = None
    if items_path is not None:
        read = _items_parquet if items_path.suffix == ".parquet" else _items_csv
        items = read(items_path, columns)
    return _assemble(name, path, frame, items)


def _interaction_columns(path: Path, header: list[str], columns: _Columns) -> dict[str, str]:
    used = {
        "user": _find_column(path, header, USER_NAMES, columns.user, "user"),
        "item": _find_column(path, header, ITEM_NAMES, columns.item, "item"),
    }
    if columns.timestamp is not None or _guess(header, TIMESTAMP_NAMES) is not None:
        used["timestamp"] = _find_column(path, header, TIMESTAMP_NAMES, columns.timestamp, "timestamp")
    return used


def _interactions_text(
    path: Path, separator: str, quote: str | None, header: list[str], columns: _Columns
) -> pl.DataFrame:
    used = _interaction_columns(path, header, columns)
    # All columns are declared, since polars overlooks surplus fields where it skips columns. Those not needed are
    # "parsed" as bool, which leaves nulls that take next to no memory.
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(header, pl.Boolean)
    schema.update(dict.fromkeys(used.values(), pl.String))

    def explain() -> str | None:
        return _first_bad_record(
            path, separator, quote, len(header), [header.index(column) for column in used.values()]
        )

    frame = _read_csv(path, explain, separator=separator, quote=quote, schema=schema)
    frame = _whole(path, frame.select(**{key: pl.col(column) for key, column in used.items()}), explain)
    return _checked(frame, lambda row: _record_name(path, separator, quote, row))


def _checked(frame: pl.DataFrame, place: Callable[[int], str]) -> pl.DataFrame:
    """Ids as they are, timestamps as numbers; a null or unreadable value is an error that names its place."""
    if "timestamp" in frame.columns:
        numbers = _numeric_times(frame["timestamp"])
        bad = numbers.is_null()
        if bad.any():
            row = int(bad.arg_true()[0])
            value = frame["timestamp"][row]
            raise ValueError(f"{place(row)}: timestamp {value!r} is neither a number nor a date")
        frame = frame.with_columns(numbers.alias("timestamp"))
    for key in ("user", "item"):
        column = frame[key]
        if column.dtype not in (pl.String, pl.Categorical, pl.Enum) and not column.dtype.is_integer():
            raise ValueError(f"{place(0)}: {key} ids must be strings or integers, not {column.dtype}")
        if column.dtype in (pl.Categorical, pl.Enum):
            column = column.cast(pl.String)
            frame = frame.with_columns(column)
        missing = column.is_null()
        if column.dtype == pl.String:
            missing = missing | (column == "").fill_null(True)
        if missing.any():
            raise ValueError(f"{place(int(missing.arg_true()[0]))}: the {key} id is missing")
    return frame


def _numeric_times(column: pl.Series) -> pl.Series:
    """Whole or fractional numbers, null where a value cannot be read; dates become seconds with a fraction."""
    kind = column.dtype
    if kind == pl.Date or kind == pl.Datetime:
        return column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    if kind.is_integer():
        return column.cast(pl.Int64, strict=False)
    if kind.is_float():
        finite = column.cast(pl.Float64)
        return finite.set(~finite.is_finite().fill_null(False), None)
    if kind != pl.String:
        return pl.Series(column.name, [None] * len(column), dtype=pl.Int64)
    text = column.str.strip_chars()
    whole = text.cast(pl.Int64, strict=False)
    if whole.null_count() == 0:
        return whole
    fractional = text.cast(pl.Float64, strict=False)
    if fractional.null_count() < len(fractional) or len(fractional) == 0:
        return fractional.set(~fractional.is_finite().fill_null(False), None)
    try:
        dates = text.str.to_datetime(strict=False, time_unit="us")
    except pl.exceptions.ComputeError:
        return whole
    return dates.dt.epoch("us") / 1e6


def _seconds(column: pl.Series) -> np.ndarray:
    """Whole seconds since 1970 from numbers whose size tells the unit."""
    values = column.to_numpy()
    largest = float(np.abs(values).max()) if len(values) else 0.0
    # 1e11 seconds is the year 5138; as milliseconds it is 1973, before there were such data.
    divisor = 1 if largest < 1e11 else 1_000 if largest < 1e14 else 1_000_000 if largest < 1e17 else 1_000_000_000
    if divisor == 1 and values.dtype.kind == "i":
        return values.astype(np.int64)
    return (values // divisor).astype(np.int64)


def _assemble(name: str, path: Path, frame: pl.DataFrame, items: Sequence[_Item] | None) -> Dataset:
    """``frame`` with ``user``, ``item`` and possibly ``timestamp``, in the order of the source, without nulls."""
    if not len(frame):
        raise ValueError(f"{path}: no interactions")
    users, used = (frame[key].unique(maintain_order=True) for key in ("user", "item"))
    table, new_index = _item_table(path, used.cast(pl.String).to_list(), items)
    frame = frame.with_columns(
        frame["user"].replace_strict(users, pl.int_range(len(users), dtype=pl.Int32, eager=True)),
        frame["item"].replace_strict(used, pl.Series(new_index, dtype=pl.Int32)),
    )
    frame = frame.sort(["user", "timestamp"] if "timestamp" in frame.columns else ["user"], maintain_order=True)
    lengths = np.bincount(frame["user"].to_numpy(), minlength=len(users))
    return Dataset(
        name,
        np.array(users.cast(pl.String).to_list()),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        frame["item"].to_numpy(),
        _seconds(frame["timestamp"]) if "timestamp" in frame.columns else None,
        table,
    )


def _item_table(path: Path, used: list[str], items: Sequence[_Item] | None) -> tuple[ItemTable, np.ndarray]:
    """The table of the items that occur, and for each of ``used`` its index in the table, int32."""
    occurring = set(used)
    kept = [item for item in items or () if item.id in occurring]
    if items is not None and not kept:
        raise ValueError(
            f"{path}: none of the item ids ({', '.join(used[:3])}, ...) is in the table of items"
            f" ({', '.join(item.id for item in items[:3])}, ...)"
        )
    described = {item.id for item in kept}
    kept += [_Item(item, item, []) for item in used if item not in described]
    names = sorted({name for item in kept for name in item.attributes if name.strip() not in NO_ATTRIBUTE})
    column = {attribute: index for index, attribute in enumerate(names)}
    attributes = np.zeros((len(kept), len(names)), bool)
    for row, item in enumerate(kept):
        for attribute in item.attributes:
            if attribute in column:
                attributes[row, column[attribute]] = True
    position = {item.id: index for index, item in enumerate(kept)}
    table = ItemTable(np.array([item.id for item in kept]), [item.title for item in kept], names, attributes)
    return table, np.fromiter((position[item] for item in used), np.int32, len(used))


def _movies_dat(path: Path) -> list[_Item]:
    items = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        # Titles may contain "::"; ids and genres do not.
        identifier, _, rest = line.partition("::")
        title, separator, genres = rest.rpartition("::")
        if not separator or not identifier.isdecimal():
            _malformed(path, number, line, "expected id::title::genres")
        _check_new(seen, identifier, number, path)
        items.append(_Item(identifier, title, _values(genres, "|")))
    return items


def _items_csv(path: Path, columns: _Columns) -> list[_Item]:
    separator = _separator(path)
    return _items_text(path, separator, '"', _header(path, separator), columns, "|")


def _items_recbole(path: Path, columns: _Columns) -> list[_Item]:
    header = [column.partition(":")[0] for column in _header(path, "\t")]
    return _items_text(path, "\t", None, header, columns, " ")


def _items_text(
    path: Path, separator: str, quote: str | None, header: list[str], columns: _Columns, default_separator: str
) -> list[_Item]:
    used = _item_columns(path, header, columns)
    year = header.index("release_year") if "release_year" in header else None
    between = default_separator if columns.separator is None else columns.separator
    items = []
    seen: dict[str, int] = {}
    for number, record in itertools.islice(_records(path, separator, quote), 1, None):
        if len(record) != len(header) or not record[used["item"]]:
            _malformed(path, number, separator.join(record), f"expected {len(header)} fields, the first with an id")
        identifier = record[used["item"]]
        _check_new(seen, identifier, number, path)
        title = record[used["title"]] if "title" in used else ""
        if year is not None and title and re.fullmatch(r"\d{4}", record[year]) and f"({record[year]})" not in title:
            title = f"{title} ({record[year]})"
        values = _values(record[used["attribute"]], between) if "attribute" in used else []
        items.append(_Item(identifier, title or identifier, values))
    return items


def _items_parquet(path: Path, columns: _Columns) -> list[_Item]:
    with _unreadable_parquet(path):
        frame = pl.read_parquet(path)
    used = _item_columns(path, frame.columns, columns)
    between = "|" if columns.separator is None else columns.separator
    items = []
    seen: dict[str, int] = {}
    for row, record in enumerate(frame.iter_rows(), start=1):
        if record[used["item"]] in (None, ""):
            raise ValueError(f"{path}, row {row}: the item id is missing")
        identifier = str(record[used["item"]])
        _check_new(seen, identifier, row, path, "row")
        title = record[used["title"]] if "title" in used else None
        value = record[used["attribute"]] if "attribute" in used else None
        if isinstance(value, (list, tuple)):
            values = [str(part).strip() for part in value if part is not None]
        else:
            values = _values("" if value is None else str(value), between)
        items.append(_Item(identifier, identifier if title in (None, "") else str(title), values))
    return items


def _item_columns(path: Path, header: list[str], columns: _Columns) -> dict[str, int]:
    """Positions of the item, title and attribute columns; the last two only where there are such."""
    named = columns.item if columns.item in header else None
    used = {"item": header.index(_find_column(path, header, (*ITEM_NAMES, "id"), named, "item"))}
    for key, given, names in (("title", columns.title, TITLE_NAMES), ("attribute", columns.attribute, ATTRIBUTE_NAMES)):
        if given is not None or _guess(header, names) is not None:
            used[key] = header.index(_find_column(path, header, names, given, key))
    return used


def _values(text: str, separator: str) -> list[str]:
    return [value for value in (part.strip() for part in text.split(separator)) if value]


def _check_new(seen: dict[str, int], identifier: str, number: int, path: Path, unit: str = "line") -> None:
    if seen.setdefault(identifier, number) != number:
        raise ValueError(
            f"{path}, {unit} {number}: item {identifier} has already appeared in {unit} {seen[identifier]}"
        )


def _plain(name: str) -> str:
    """``userId``, ``user_id`` and ``User ID`` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _guess(header: Sequence[str], names: Sequence[str]) -> str | None:
    by_plain = {_plain(column): column for column in reversed(header)}
    return next((by_plain[_plain(name)] for name in names if _plain(name) in by_plain), None)


def _find_column(path: Path, header: Sequence[str], names: Sequence[str], given: str | None, what: str) -> str:
    if given is not None:
        if given in header:
            return given
        raise ValueError(f"{path}: no column {given!r} for the {what}; the columns are {', '.join(header)}")
    found = _guess(header, names)
    if found is None:
        raise ValueError(
            f"{path}: no {what} column; looked for {', '.join(names)}; the columns are {', '.join(header)};"
            f" name it with {what}_column"
        )
    return found


def _separator(path: Path) -> str:
    if path.suffix == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        first = stream.readline()
    return max(",\t;|", key=first.count)


def _header(path: Path, separator: str) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        header = next(_csv_reader(stream, separator, None if separator == "\t" else '"'), [])
    if not any(header):
        raise ValueError(f"{path}: empty, expected a header line with column names")
    repeated = [column for column in header if header.count(column) > 1]
    if repeated:
        raise ValueError(f"{path}, line 1: column {repeated[0]!r} appears more than once")
    return header


def _encoding(path: Path) -> str:
    """utf-8 where the file is valid as such, else latin-1 (GroupLens' older sets)."""
    try:
        with path.open(encoding="utf-8") as stream:
            while stream.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, blank ones left out."""
    with path.open(encoding=_encoding(path), newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _records(path: Path, separator: str, quote: str | None) -> Iterator[tuple[int, list[str]]]:
    """Records with the number of their last line, blank lines left out."""
    with path.open(encoding=_encoding(path), newline="") as stream:
        reader = _csv_reader(stream, separator, quote)
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            if record is None:
                return
            if record:
                yield reader.line_num, record


def _csv_reader(stream: TextIO, separator: str, quote: str | None) -> _csv.Reader:
    if quote is None:
        return csv.reader(stream, delimiter=separator, quoting=csv.QUOTE_NONE)
    return csv.reader(stream, delimiter=separator, quotechar=quote)


def _malformed(path: Path, number: int, line: str, expected: str) -> NoReturn:
    raise ValueError(f"{path}, line {number}: {expected}, got {_shortened(line)!r}")


def _shortened(line: str) -> str:
    return line if len(line) <= 120 else line[:117] + "..."


@contextmanager
def _unreadable_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None


def _read_csv(
    path: Path,
    explain: Callable[[], str | None],
    *,
    separator: str,
    quote: str | None,
    schema: Mapping[str, type[pl.DataType]],
    has_header: bool = True,
) -> pl.DataFrame:
    """Read with polars; values that do not parse become null. ``explain`` finds the malformed line after a failure."""
    try:
        with warnings.catch_warnings():
            # Polars warns about a stray quote where it then reads something else than what is there.
            warnings.simplefilter("error", UserWarning)
            return pl.read_csv(
                path,
                has_header=False,
                skip_rows=int(has_header),  # the names in the schema need not be those in the file
                separator=separator,
                quote_char=quote,
                schema=dict(schema),
                ignore_errors=True,
            )
    except pl.exceptions.NoDataError:
        raise ValueError(f"{path}: no interactions") from None
    except (pl.exceptions.PolarsError, UserWarning) as error:
        raise ValueError(explain() or f"{path}: malformed ({error})") from None


def _whole(path: Path, frame: pl.DataFrame, explain: Callable[[], str | None]) -> pl.DataFrame:
    """``frame`` without the rows that stand for blank lines; any other missing value is an error."""
    if not any(frame[column].null_count() for column in frame.columns):
        return frame
    bad = explain()
    if bad is not None:
        raise ValueError(bad)
    kept = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    if any(kept[column].null_count() for column in kept.columns):
        raise ValueError(f"{path}: malformed, some values are missing")
    return kept


def _first_bad_line(
    path: Path, separator: str, n_fields: int, integers: Mapping[int, str], *, skip: int = 0
) -> str | None:
    """Where a file without quoting goes wrong, None where nothing is found."""
    for number, line in itertools.islice(_lines(path), skip, None):
        fields = line.split(separator)
        if len(fields) != n_fields:
            return (
                f"{path}, line {number}: expected {n_fields} fields separated by {separator!r}, got {len(fields)}:"
                f" {_shortened(line)!r}"
            )
        for position, what in integers.items():
            if not re.fullmatch(r"-?[0-9]{1,18}", fields[position]):
                return f"{path}, line {number}: {what} {fields[position]!r} is no integer"
    return None


def _first_bad_record(
    path: Path, separator: str, quote: str | None, n_fields: int, needed: Sequence[int] = ()
) -> str | None:
    """The same for files with quoting; ``needed`` are fields that must not be empty."""
    start = 0
    try:
        for number, record in _records(path, separator, quote):
            start = number
            line = _shortened(separator.join(record))
            if len(record) != n_fields:
                return f"{path}, line {number}: expected {n_fields} fields, got {len(record)}: {line!r}"
            if any(not record[position] for position in needed):
                return f"{path}, line {number}: a user, item or timestamp is missing: {line!r}"
    except ValueError as error:
        return f"{error} (in the record after line {start})"
    return None


def _record_name(path: Path, separator: str, quote: str | None, row: int) -> str:
    for index, (number, _) in enumerate(_records(path, separator, quote)):
        if index == row + 1:  # the header is record 0
            return f"{path}, line {number}"
    return f"{path}, row {row + 1}"
