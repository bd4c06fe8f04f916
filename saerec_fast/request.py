"""The small language of ``--steer`` and ``--history``: from what a person types to edits and item indices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np

from saerec_fast.types import Edit

_SPEC = re.compile(r"^(?P<name>.+?)=(?P<op>[+\-x]?)(?P<value>\d+(\.\d*)?|\.\d+)$")


def parse_edit(text: str, feature_of: Callable[[str], int], unit_of: Callable[[int], float]) -> Edit:
    """One edit, such as ``Horror=+2``, ``Horror=-1``, ``Comedy=0``, ``Drama=x0.5`` or ``#812=+1``.

    ``+`` and ``-`` add, ``x`` scales, a bare number sets. Added and set values are in units of a strong activation of
    the feature (in a run, the 90th percentile of those it has), so that 1 means as much for every feature.

    Args:
        text: ``NAME=VALUE`` with an attribute's name or ``#`` and a feature id.
        feature_of: the feature of an attribute; raises ``ValueError`` for an unknown one.
        unit_of: activation that stands for 1, per feature.

    Raises:
        ValueError: not of this form, or an unknown attribute.
    """
    match = _SPEC.match(text.strip())
    if match is None:
        raise ValueError(
            f"steer: expected NAME=+2, NAME=-1, NAME=0 or NAME=x0.5 (NAME an attribute, or #ID a feature), got {text!r}"
        )
    name, op, value = match["name"].strip(), match["op"], float(match["value"])
    feature = int(name[1:]) if re.fullmatch(r"#\d+", name) else feature_of(name)
    if op == "x":
        return Edit(feature, "scale", value)
    unit = unit_of(feature)
    if op == "":
        return Edit(feature, "set", value * unit)
    return Edit(feature, "add", (value if op == "+" else -value) * unit)


def parse_history(text: str, titles: Sequence[str]) -> np.ndarray:
    """Item indices of titles separated by ``;``, oldest first.

    A title is found regardless of case, as a whole or by a part of it that only one item has.

    Raises:
        ValueError: no such title (close ones are named), or several.
    """
    lowered = [title.lower() for title in titles]
    return np.array([_find(part.strip(), titles, lowered) for part in text.split(";") if part.strip()], dtype=np.int64)


def _find(query: str, titles: Sequence[str], lowered: Sequence[str]) -> int:
    wanted = query.lower()
    without_year = [re.sub(r"\s*\(\d{4}\)$", "", title) for title in lowered]
    for candidates in (
        [i for i, title in enumerate(lowered) if title == wanted],
        [i for i, title in enumerate(without_year) if title == wanted],
        [i for i, title in enumerate(lowered) if wanted in title],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            some = "; ".join(titles[i] for i in candidates[:5])
            raise ValueError(f"history: {query!r} fits {len(candidates)} items, say which: {some}")
    near = difflib.get_close_matches(wanted, without_year, n=3, cutoff=0.5)
    hint = "; ".join(titles[without_year.index(title)] for title in near)
    raise ValueError(f"history: no item has the title {query!r}" + (f"; did you mean {hint}?" if hint else ""))
