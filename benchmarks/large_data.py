"""Interactions as many as wanted, of the shape of ML-20M, in its layout: ``ratings.csv`` and ``movies.csv``.

Users are made a block at a time by :func:`saerec_fast.data.synthetic_dataset` over one catalogue, so that memory does
not grow with the data. Equal arguments give equal files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from saerec_fast.data import Dataset, ItemTable, synthetic_dataset

N_INTERACTIONS = 20_000_000
N_ITEMS = 27_000
N_ATTRIBUTES = 20
# Of this many interactions a user, some 145 are left once repeats are out: 138,000 users for 20 million.
MEAN_LENGTH = 163.0
BLOCK_USERS = 4_000


def write_large_data(
    folder: Path,
    n_interactions: int = N_INTERACTIONS,
    *,
    n_items: int = N_ITEMS,
    n_attributes: int = N_ATTRIBUTES,
    mean_length: float = MEAN_LENGTH,
    seed: int = 0,
) -> int:
    """Write ``ratings.csv`` and ``movies.csv`` into ``folder``, which is made where it is missing.

    Args:
        folder: where to.
        n_interactions: lines of ``ratings.csv`` less its header; the last user is cut short for it.
        n_items, n_attributes, mean_length, seed: see :func:`saerec_fast.data.synthetic_dataset`; the number of users
            follows from them.

    Returns:
        The number of users.

    Raises:
        ValueError: ``n_interactions`` below 1, or what :func:`saerec_fast.data.synthetic_dataset` refuses.
    """
    if n_interactions < 1:
        raise ValueError(f"n_interactions: expected at least 1, got {n_interactions}")
    folder.mkdir(parents=True, exist_ok=True)
    n_users = written = block = 0
    with (folder / "ratings.csv").open("wb") as stream:
        while written < n_interactions:
            part = synthetic_dataset(
                BLOCK_USERS,
                n_items,
                n_attributes,
                seed=int(np.random.SeedSequence([seed, block]).generate_state(1)[0]),
                mean_length=mean_length,
                catalogue_seed=seed,
            )
            frame = _ratings(part, n_users, seed + block).head(n_interactions - written)
            frame.write_csv(stream, include_header=block == 0)
            n_users = int(frame["userId"][-1])
            written += len(frame)
            block += 1
    _movies(part.item_table).write_csv(folder / "movies.csv")
    return n_users


def _ratings(part: Dataset, users_before: int, seed: int) -> pl.DataFrame:
    assert part.timestamps is not None
    stars = np.random.default_rng(seed).integers(1, 11, size=part.n_interactions) / 2
    return pl.DataFrame(
        {
            "userId": users_before + 1 + np.repeat(np.arange(part.n_users), part.lengths),
            "movieId": part.items + 1,
            "rating": stars,
            "timestamp": part.timestamps,
        }
    )


def _movies(table: ItemTable) -> pl.DataFrame:
    names = np.array(table.attribute_names)
    return pl.DataFrame(
        {
            "movieId": np.arange(1, len(table) + 1),
            "title": table.titles,
            "genres": ["|".join(names[row]) for row in table.attributes],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--interactions", type=int, default=N_INTERACTIONS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    n_users = write_large_data(arguments.folder, arguments.interactions, seed=arguments.seed)
    print(f"{arguments.folder}: {arguments.interactions:,} interactions of {n_users:,} users")


if __name__ == "__main__":
    main()
