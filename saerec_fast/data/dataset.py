"""Interaction sequences and the items they are made of, as flat numpy arrays."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as zlib_error

import numpy as np

from saerec_fast.files import atomic_path, read_json, write_json

FORMAT_VERSION = 1
ARRAYS_FILE = "interactions.npz"
DESCRIPTION_FILE = "dataset.json"


@dataclass(frozen=True, eq=False)
class ItemTable:
    """What is known about each item; an item's index is its position here.

    Args:
        ids: raw ids, unicode ``(n_items,)``, each one once.
        titles: one title per item, the raw id where the source has none.
        attribute_names: names of the attributes (genres, categories, ...), each one once.
        attributes: bool ``(n_items, n_attributes)``, True where the item has the attribute.

    Raises:
        ValueError: sizes that do not fit together, or an id or name that appears twice.
    """

    ids: np.ndarray
    titles: list[str]
    attribute_names: list[str]
    attributes: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _unicode(self.ids, "item ids"))
        object.__setattr__(self, "titles", list(self.titles))
        object.__setattr__(self, "attribute_names", list(self.attribute_names))
        n_items, n_attributes = len(self.ids), len(self.attribute_names)
        if len(self.titles) != n_items:
            raise ValueError(f"expected one title per item ({n_items}), got {len(self.titles)}")
        attributes = np.asarray(self.attributes)
        if attributes.dtype != np.bool_ or attributes.shape != (n_items, n_attributes):
            raise ValueError(
                f"expected attributes as bool ({n_items}, {n_attributes}), got {attributes.dtype} {attributes.shape}"
            )
        object.__setattr__(self, "attributes", attributes)
        if len(np.unique(self.ids)) != n_items:
            values, counts = np.unique(self.ids, return_counts=True)
            raise ValueError(f"item id {str(values[counts > 1][0])!r} appears more than once")
        if len(set(self.attribute_names)) != n_attributes:
            raise ValueError(f"attribute names appear more than once: {self.attribute_names}")

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, items: np.ndarray) -> ItemTable:
        """The table of ``items`` (item indices) in the order given."""
        return ItemTable(
            self.ids[items], [self.titles[int(item)] for item in items], self.attribute_names, self.attributes[items]
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Every user's items in time order, one user after the other.

    User ``u`` owns positions ``offsets[u]`` to ``offsets[u + 1]`` of ``items`` and ``timestamps``.

    Args:
        name: a short name for reports.
        user_ids: raw ids, unicode ``(n_users,)``.
        offsets: int64 ``(n_users + 1,)``, from 0 to ``n_interactions``, never falling.
        items: int32 ``(n_interactions,)``, indices into ``item_table``.
        timestamps: int64 ``(n_interactions,)`` in seconds since 1970 (UTC), never falling within a user; None where
            the source has none.
        item_table: the items.

    Raises:
        ValueError: an array of the wrong shape or kind, an item index outside the table, or a user whose timestamps
            fall.
    """

    name: str
    user_ids: np.ndarray
    offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None
    item_table: ItemTable

    def __post_init__(self) -> None:
        object.__setattr__(self, "user_ids", _unicode(self.user_ids, "user ids"))
        object.__setattr__(self, "offsets", _integers(self.offsets, np.dtype(np.int64), "offsets"))
        object.__setattr__(self, "items", _integers(self.items, np.dtype(np.int32), "items"))
        offsets, items = self.offsets, self.items
        if offsets.shape != (len(self.user_ids) + 1,):
            raise ValueError(
                f"expected offsets of length {len(self.user_ids) + 1} (one more than users), got {len(offsets)}"
            )
        if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets must rise from 0 to the number of interactions ({len(items)}); they start at {offsets[0]}"
                f" and end at {offsets[-1]}"
            )
        if len(items) and (items.min() < 0 or items.max() >= len(self.item_table)):
            raise ValueError(
                f"item indices must lie in 0..{len(self.item_table) - 1}, got {items.min()}..{items.max()}"
            )
        if self.timestamps is None:
            return
        object.__setattr__(self, "timestamps", _integers(self.timestamps, np.dtype(np.int64), "timestamps"))
        timestamps = self.timestamps
        if len(timestamps) != len(items):
            raise ValueError(f"expected one timestamp per interaction ({len(items)}), got {len(timestamps)}")
        falls = np.flatnonzero(timestamps[1:] < timestamps[:-1]) + 1
        # A fall is fine where the next user's sequence starts. Users without items repeat an offset, hence isin.
        falls = falls[~np.isin(falls, offsets)] if len(falls) else falls
        if len(falls):
            user = int(np.searchsorted(offsets, falls[0], side="right")) - 1
            raise ValueError(f"the timestamps of user {str(self.user_ids[user])!r} are not in time order")

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """Items in the table, whether or not anybody here interacted with them."""
        return len(self.item_table)

    @property
    def n_interactions(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """Interactions of each user, int64 ``(n_users,)``."""
        return np.diff(self.offsets)

    def sequence(self, user: int) -> np.ndarray:
        """The items of one user in time order, int32 ``(length,)``; a view, not a copy.

        Raises:
            IndexError: no such user (negative indices are not accepted).
        """
        if not 0 <= user < self.n_users:
            raise IndexError(f"user {user} is not in 0..{self.n_users - 1}")
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def select_users(self, users: np.ndarray) -> Dataset:
        """The data of some users, in the order given, over the same item table.

        Args:
            users: user indices, integers ``(n,)``. A user named twice appears twice (a bootstrap sample).

        Raises:
            ValueError: not integers, or an index that is out of range.
        """
        users = _integers(users, np.dtype(np.int64), "users")
        if len(users) and (users.min() < 0 or users.max() >= self.n_users):
            raise ValueError(f"user indices must lie in 0..{self.n_users - 1}, got {users.min()}..{users.max()}")
        lengths = self.lengths[users]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[users] - offsets[:-1], lengths)
        return Dataset(
            self.name,
            self.user_ids[users],
            offsets,
            self.items[positions],
            None if self.timestamps is None else self.timestamps[positions],
            self.item_table,
        )

    @classmethod
    def concatenate(cls, name: str, parts: Sequence[Dataset]) -> Dataset:
        """The users of several data sets over one item table, in this order.

        Timestamps are kept where all parts have them.

        Raises:
            ValueError: no parts, or parts with different item tables.
        """
        if not parts:
            raise ValueError("parts: expected at least one data set")
        table = parts[0].item_table
        if any(not np.array_equal(part.item_table.ids, table.ids) for part in parts):
            raise ValueError("parts: expected data sets over one item table")
        times = [part.timestamps for part in parts if part.timestamps is not None]
        return cls(
            name=name,
            user_ids=np.concatenate([part.user_ids for part in parts]),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
            items=np.concatenate([part.items for part in parts]),
            timestamps=np.concatenate(times) if len(times) == len(parts) else None,
            item_table=table,
        )

    def fingerprint(self) -> str:
        """A hash (hex, 32 characters) of everything but the name: equal exactly where the data are equal."""
        digest = hashlib.sha256()
        parts: list[np.ndarray] = [self.offsets, self.items, self.item_table.attributes]
        if self.timestamps is not None:
            parts.append(self.timestamps)
        for array in parts:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        table = self.item_table
        for texts in (self.user_ids.tolist(), table.ids.tolist(), table.titles, table.attribute_names):
            digest.update("\0".join(texts).encode("utf-8", "surrogatepass") + b"\1")
        return digest.hexdigest()[:32]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write into folder ``path``: ``interactions.npz`` (numbers and ids, no pickle) and ``dataset.json``.

        Each file appears whole or not at all, and a hash in both ties them together, so that :meth:`load` notices
        where a crash left one of them from an earlier save.
        """
        folder = Path(path)
        fingerprint = self.fingerprint()
        arrays = {
            "fingerprint": np.array(fingerprint),
            "user_ids": self.user_ids,
            "offsets": self.offsets,
            "items": self.items,
            "item_ids": self.item_table.ids,
            "attributes": self.item_table.attributes,
        }
        if self.timestamps is not None:
            arrays["timestamps"] = self.timestamps
        with atomic_path(folder / ARRAYS_FILE) as temporary, temporary.open("wb") as stream:
            # A stream, since numpy appends ".npz" to a file name that lacks it.
            np.savez(stream, allow_pickle=False, **arrays)
        write_json(
            folder / DESCRIPTION_FILE,
            {
                "format": "saerec-fast dataset",
                "version": FORMAT_VERSION,
                "name": self.name,
                "fingerprint": fingerprint,
                "n_users": self.n_users,
                "n_items": self.n_items,
                "n_interactions": self.n_interactions,
                "attribute_names": self.item_table.attribute_names,
                "titles": self.item_table.titles,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dataset:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no saved dataset in ``path``.
            ValueError: a file is damaged, from another version, or the two files belong to different saves.
        """
        folder = Path(path)
        if not is_saved_dataset(folder):
            raise FileNotFoundError(f"{folder}: no saved dataset ({DESCRIPTION_FILE} and {ARRAYS_FILE}) in this folder")
        description = read_json(folder / DESCRIPTION_FILE)
        if not isinstance(description, dict) or description.get("format") != "saerec-fast dataset":
            raise ValueError(f"{folder / DESCRIPTION_FILE}: not the description of a saved dataset")
        if description.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / DESCRIPTION_FILE}: version {description.get('version')},"
                f" this release reads {FORMAT_VERSION}"
            )
        try:
            with (folder / ARRAYS_FILE).open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
            if str(arrays["fingerprint"]) != description["fingerprint"]:
                raise ValueError("it belongs to another save than dataset.json; save the dataset again")
            table = ItemTable(
                arrays["item_ids"], description["titles"], description["attribute_names"], arrays["attributes"]
            )
            return cls(
                description["name"],
                arrays["user_ids"],
                arrays["offsets"],
                arrays["items"],
                arrays.get("timestamps"),
                table,
            )
        except (OSError, EOFError, KeyError, ValueError, zlib_error, BadZipFile) as error:
            raise ValueError(f"{folder / ARRAYS_FILE}: not usable ({error})") from error


def is_saved_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder that :meth:`Dataset.save` wrote."""
    return (Path(path) / DESCRIPTION_FILE).is_file() and (Path(path) / ARRAYS_FILE).is_file()


def describe(dataset: Dataset) -> dict[str, Any]:
    """Counts for people to read; every value can be written as json.

    Returns:
        ``name``; ``n_users``, ``n_items``, ``n_interactions``, ``n_attributes``; ``density`` (distinct user-item
        pairs over all possible ones); ``sequence_length`` with ``min``, ``q25``, ``median``, ``q75``, ``q95``,
        ``max``, ``mean``; ``items_without_attributes``; ``attributes``, a list of ``{"name", "item_share",
        "interaction_share"}``, most interactions first; ``first_time`` and ``last_time`` (ISO 8601, UTC), None
        without timestamps. Values that have no meaning for empty data are None.
    """
    table, lengths = dataset.item_table, dataset.lengths
    quantiles: dict[str, float | None] = dict.fromkeys(("min", "q25", "median", "q75", "q95", "max", "mean"))
    if len(lengths):
        values = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1])
        quantiles = dict(zip(quantiles, [*values.tolist(), float(lengths.mean())], strict=True))
    item_shares = table.attributes.mean(axis=0) if len(table) else np.zeros(len(table.attribute_names))
    shares = attribute_shares(dataset)
    order = np.argsort(-shares, kind="stable")
    timestamps = dataset.timestamps
    has_times = timestamps is not None and len(timestamps) > 0
    cells = dataset.n_users * dataset.n_items
    return {
        "name": dataset.name,
        "n_users": dataset.n_users,
        "n_items": dataset.n_items,
        "n_interactions": dataset.n_interactions,
        "n_attributes": len(table.attribute_names),
        "density": _count_pairs(dataset) / cells if cells else None,
        "sequence_length": quantiles,
        "items_without_attributes": int((~table.attributes.any(axis=1)).sum()),
        "attributes": [
            {
                "name": table.attribute_names[index],
                "item_share": float(item_shares[index]),
                "interaction_share": float(shares[index]),
            }
            for index in order
        ],
        "first_time": _iso_time(timestamps.min()) if has_times and timestamps is not None else None,
        "last_time": _iso_time(timestamps.max()) if has_times and timestamps is not None else None,
    }


def attribute_shares(dataset: Dataset) -> np.ndarray:
    """The share of interactions whose item has the attribute, float64 ``(n_attributes,)``; 0 without interactions."""
    counts = np.bincount(dataset.items, minlength=dataset.n_items).astype(np.float64)
    return counts @ dataset.item_table.attributes / max(dataset.n_interactions, 1)


def common_attributes(dataset: Dataset, min_share: float = 0.01) -> np.ndarray:
    """Indices of the attributes frequent enough to be summarised.

    Rare attributes stay in the item table, but averages over attributes leave them out: a maximum over a thousand
    features says little about an attribute that a handful of rows has.

    Args:
        min_share: least share of the interactions of ``dataset`` (the training part) whose item has the attribute.

    Returns:
        int64, rising.

    Raises:
        ValueError: ``min_share`` is not in 0..1.
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must lie in 0..1, got {min_share}")
    return np.flatnonzero(attribute_shares(dataset) >= min_share)


def _count_pairs(dataset: Dataset) -> int:
    """Distinct (user, item) pairs, a bounded number of interactions at a time."""
    count = 0
    for start, stop in user_chunks(dataset.offsets, 4_000_000):
        first, last = dataset.offsets[start], dataset.offsets[stop]
        users = np.repeat(np.arange(start, stop), np.diff(dataset.offsets[start : stop + 1]))
        pairs = users * np.int64(dataset.n_items) + dataset.items[first:last]
        pairs.sort()  # many times faster here than np.unique
        count += int((np.diff(pairs) != 0).sum()) + bool(len(pairs))
    return count


def user_chunks(offsets: np.ndarray, interactions: int) -> list[tuple[int, int]]:
    """Ranges of users that together cover everybody, each with about ``interactions`` interactions or one user."""
    edges = np.searchsorted(offsets, np.arange(interactions, offsets[-1], interactions), side="left")
    bounds = np.unique(np.concatenate([[0], edges, [len(offsets) - 1]])).tolist()
    return list(itertools.pairwise(bounds))


def _iso_time(seconds: np.int64) -> str | None:
    try:
        return datetime.fromtimestamp(int(seconds), tz=timezone.utc).isoformat()
    except (OverflowError, OSError, ValueError):  # outside the years 1..9999
        return None


def _unicode(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 1 and len(array) == 0:
        return np.zeros(0, "U1")
    if array.ndim != 1 or array.dtype.kind not in "UO":
        raise ValueError(f"expected {what} as a one-dimensional array of strings, got {array.dtype} {array.shape}")
    if array.dtype.kind == "O":
        if not all(isinstance(value, str) for value in array):
            raise ValueError(f"expected {what} to be strings")
        array = array.astype(np.str_)
    return array


def _integers(values: Any, dtype: np.dtype[Any], what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"expected {what} as a one-dimensional array of integers, got {array.dtype} {array.shape}")
    if array.dtype == dtype:
        return array
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(f"{what} do not fit {dtype}")
    return array.astype(dtype)
