"""Disjoint groups of users to train the recommender, to stop it, to train the SAE and to test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from saerec_fast.data.dataset import Dataset
from saerec_fast.files import read_json, write_json

FORMAT_VERSION = 1
DESCRIPTION_FILE = "split.json"
PARTS = ("train", "validation", "train_sae", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Four data sets with no user in common over one and the same item table.

    Every item of the table occurs in ``train``, so that no model meets an item it could not have learned.

    Args:
        train: trains the recommender.
        validation: decides when its training stops.
        train_sae: its hidden states train the SAE.
        test: all that is reported.
        notes: what was dropped and which fall-back was taken, one sentence each.

    Raises:
        ValueError: the parts do not share one item table object.
    """

    train: Dataset
    validation: Dataset
    train_sae: Dataset
    test: Dataset
    notes: list[str]

    def __post_init__(self) -> None:
        if any(part.item_table is not self.train.item_table for part in self.parts.values()):
            raise ValueError("the parts of a split must share one item table")

    @property
    def parts(self) -> dict[str, Dataset]:
        """The four data sets by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def non_test(self) -> Dataset:
        """All users but the test users."""
        return Dataset.concatenate("all but the test users", [self.train, self.validation, self.train_sae])

    @property
    def n_items(self) -> int:
        return self.train.n_items

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write into folder ``path``: a folder per part (see :meth:`Dataset.save`), then ``split.json``."""
        folder = Path(path)
        for name, part in self.parts.items():
            part.save(folder / name)
        write_json(
            folder / DESCRIPTION_FILE,
            {
                "format": "saerec-fast split",
                "version": FORMAT_VERSION,
                "fingerprints": {name: part.fingerprint() for name, part in self.parts.items()},
                "notes": self.notes,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Split:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no saved split in ``path``.
            ValueError: damaged, from another version, or parts of different saves.
        """
        folder = Path(path)
        description_path = folder / DESCRIPTION_FILE
        if not description_path.is_file():
            raise FileNotFoundError(f"{folder}: no saved split ({DESCRIPTION_FILE}) in this folder")
        description = read_json(description_path)
        if not isinstance(description, dict) or description.get("format") != "saerec-fast split":
            raise ValueError(f"{description_path}: not the description of a saved split")
        if description.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{description_path}: version {description.get('version')}, this release reads {FORMAT_VERSION}"
            )
        parts = {name: Dataset.load(folder / name) for name in PARTS}
        expected = description.get("fingerprints", {})
        changed = [name for name in PARTS if parts[name].fingerprint() != expected.get(name)]
        if changed:
            raise ValueError(f"{folder}: {', '.join(changed)} belongs to another split; split again")
        table = parts["train"].item_table
        shared = {name: replace(part, item_table=table) for name, part in parts.items()}
        return cls(**shared, notes=[str(note) for note in description.get("notes", [])])


def split_users(
    dataset: Dataset,
    *,
    test_share: float = 0.15,
    sae_share: float = 0.2,
    validation_share: float = 0.05,
    min_item_count: int = 5,
    seed: int = 0,
) -> Split:
    """Split by users: the newest test, a random share trains the SAE, a small random one stops training.

    First, items with fewer than ``min_item_count`` interactions and then users with fewer than 2 remaining ones are
    dropped. Test users are those whose first event in ``dataset`` is latest (ties: later in the data); without
    timestamps they are a random share, which the notes say. At the end, items that no training user has, and users
    who keep fewer than 2 items, are dropped from all parts. Within a part, users stay in the order of ``dataset``.

    Rare attributes stay in the table; summaries leave them out with
    :func:`~saerec_fast.data.dataset.common_attributes`.

    Args:
        test_share, sae_share, validation_share: shares of the users left after dropping, each rounded to whole users
            and at least one; what remains trains the recommender.
        min_item_count: least number of interactions of an item in the whole of ``dataset``; 1 keeps all.
        seed: of the random shares. Equal arguments give equal splits.

    Raises:
        ValueError: a share outside (0, 1), shares that leave nobody for training, ``min_item_count`` below 1, or data
            too small for four parts.
    """
    shares = {"test_share": test_share, "sae_share": sae_share, "validation_share": validation_share}
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {share}")
    if sum(shares.values()) >= 1:
        stated = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise ValueError(f"the shares must sum to less than 1, so that users remain for training, got {stated}")
    if min_item_count < 1:
        raise ValueError(f"min_item_count must be at least 1, got {min_item_count}")

    notes = []
    counts = np.bincount(dataset.items, minlength=dataset.n_items)
    frequent = counts >= min_item_count
    n_rare = int(((counts > 0) & ~frequent).sum())
    if n_rare:
        notes.append(
            f"Dropped {_number(n_rare, 'item')} with fewer than {min_item_count} interactions"
            f" ({_number(int(counts[~frequent].sum()), 'interaction')})."
        )
    first_times = None
    if dataset.timestamps is not None:
        # An empty sequence has no first event; it is dropped below, so that any number will do.
        starts = np.minimum(dataset.offsets[:-1], max(dataset.n_interactions - 1, 0))
        first_times = dataset.timestamps[starts] if dataset.n_interactions else np.zeros(dataset.n_users, np.int64)
    kept = _keep_items(dataset, frequent)
    users = np.flatnonzero(kept.lengths >= 2)
    if len(users) < dataset.n_users:
        notes.append(f"Dropped {_number(dataset.n_users - len(users), 'user')} with fewer than 2 items.")

    sizes = {name: max(1, round(share * len(users))) for name, share in shares.items()}
    n_train = len(users) - sum(sizes.values())
    if n_train < 1:
        raise ValueError(f"{_number(len(users), 'user')} with at least 2 items cannot be split into four parts")
    generator = np.random.default_rng(seed)
    if first_times is None:
        by_age = generator.permutation(users)
        notes.append("There are no timestamps: the test users are a random share, not the newest users.")
    else:
        by_age = users[np.argsort(first_times[users], kind="stable")]
    older, test = np.split(by_age, [len(users) - sizes["test_share"]])
    # Sorted first, so that the random shares depend on who the older users are and not on their age.
    shuffled = generator.permutation(np.sort(older))
    train_sae, validation, train = np.split(
        shuffled, [sizes["sae_share"], sizes["sae_share"] + sizes["validation_share"]]
    )
    groups = {"train": train, "validation": validation, "train_sae": train_sae, "test": test}
    parts = {name: kept.select_users(np.sort(members)) for name, members in groups.items()}

    return _known_from_training(kept, parts, notes)


def cross_validation_splits(
    dataset: Dataset, *, n_folds: int = 5, validation_share: float = 0.05, seed: int = 0
) -> Iterator[Split]:
    """Splits in which every user is a test user once, so that all of ``dataset`` can be measured by held-out users.

    The users are dealt at random into ``n_folds`` folds. Each in turn is ``test``; of the others, a random
    ``validation_share`` decides when training stops and the rest trains. ``train_sae`` is empty. As in
    :func:`split_users`, items that no training user of a fold has are dropped from that fold, and users who keep fewer
    than 2 items with them.

    Args:
        dataset: all users there are.
        n_folds: at least 2.
        validation_share: in (0, 1), of the users outside the fold; at least one user.
        seed: of the folds and of who validates. Equal arguments give equal splits.

    Raises:
        ValueError: an argument outside its range, or too few users for the folds.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, got {n_folds}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share}")
    if dataset.n_users < max(n_folds, 4):
        raise ValueError(f"{_number(dataset.n_users, 'user')} cannot be dealt into {n_folds} folds")
    return _folds(dataset, n_folds, validation_share, np.random.default_rng(seed).permutation(dataset.n_users))


def _folds(dataset: Dataset, n_folds: int, validation_share: float, order: np.ndarray) -> Iterator[Split]:
    for fold in range(n_folds):
        others = np.delete(order, np.s_[fold::n_folds])
        n_validation = max(1, round(validation_share * len(others)))
        groups = {
            "train": others[n_validation:],
            "validation": others[:n_validation],
            "train_sae": others[:0],
            "test": order[fold::n_folds],
        }
        parts = {name: dataset.select_users(np.sort(members)) for name, members in groups.items()}
        yield _known_from_training(dataset, parts, [])


def _known_from_training(kept: Dataset, parts: Mapping[str, Dataset], notes: list[str]) -> Split:
    """Drop items no training user has and users left with fewer than 2; ``notes`` gets a sentence about each."""
    present = np.bincount(kept.items, minlength=kept.n_items) > 0
    trained = np.zeros(kept.n_items, bool)
    trained[parts["train"].items] = True
    n_unseen = int((present & ~trained).sum())
    if n_unseen:
        lost = sum(int((~trained[part.items]).sum()) for part in parts.values())
        notes.append(f"Dropped {_number(n_unseen, 'item')} that no training user has ({_number(lost, 'interaction')}).")
    new_index = np.cumsum(trained) - 1
    table = kept.item_table.select(np.flatnonzero(trained))
    finished = {}
    for name, part in parts.items():
        part = _keep_items(part, trained)
        long_enough = np.flatnonzero(part.lengths >= 2)
        if part.n_users and not len(long_enough):
            raise ValueError(f"no {name} user has 2 items that training users have too; the data are too small")
        if len(long_enough) < part.n_users:
            n_lost = part.n_users - len(long_enough)
            notes.append(f"Dropped {_number(n_lost, 'user')} of {name} with fewer than 2 items known from training.")
            part = part.select_users(long_enough)
        finished[name] = replace(part, items=new_index[part.items].astype(np.int32), item_table=table)
    return Split(**finished, notes=notes)


def _keep_items(dataset: Dataset, keep: np.ndarray) -> Dataset:
    """Leave out the interactions with items whose ``keep``, bool ``(n_items,)``, is False; the table stays whole."""
    mask = keep[dataset.items]
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask, dtype=np.int64)])
    return replace(
        dataset,
        offsets=before[dataset.offsets],
        items=dataset.items[mask],
        timestamps=None if dataset.timestamps is None else dataset.timestamps[mask],
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
