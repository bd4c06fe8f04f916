import pytest

from saerec_fast.request import parse_edit, parse_history
from saerec_fast.types import Edit

TITLES = ["Toy Story (1995)", "Toy Story 2 (1999)", "Alien (1979)", "Aliens (1986)", "Heat"]


def feature_of(name: str) -> int:
    if name.lower() != "horror":
        raise ValueError(f"attribute: unknown {name}")
    return 7


def unit_of(feature: int) -> float:
    return 0.5 if feature == 7 else 2.0


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("Horror=+2", Edit(7, "add", 1.0)),
        ("horror=-1", Edit(7, "add", -0.5)),
        (" Horror =3 ", Edit(7, "set", 1.5)),
        ("Horror=0", Edit(7, "set", 0.0)),
        ("Horror=x0.5", Edit(7, "scale", 0.5)),
        ("#12=+.5", Edit(12, "add", 1.0)),
    ],
)
def test_edits_are_in_units_of_the_feature(text: str, edit: Edit) -> None:
    assert parse_edit(text, feature_of, unit_of) == edit


@pytest.mark.parametrize("text", ["Horror", "Horror=", "=+2", "Horror=two", "Horror=+-2", "Horror=x-1"])
def test_what_is_not_an_edit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="steer: expected NAME"):
        parse_edit(text, feature_of, unit_of)


def test_an_unknown_attribute_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown Comedy"):
        parse_edit("Comedy=+1", feature_of, unit_of)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("Toy Story (1995); heat", [0, 4]),
        ("toy story", [0]),
        ("Alien", [2]),
        ("toy story 2", [1]),
        ("1986;", [3]),
    ],
)
def test_titles_are_found_whole_without_year_or_in_part(text: str, items: list[int]) -> None:
    assert parse_history(text, TITLES).tolist() == items


def test_a_title_that_fits_several_items_is_an_error() -> None:
    with pytest.raises(ValueError, match="'toy' fits 2 items, say which: Toy Story"):
        parse_history("toy", TITLES)


def test_a_title_that_fits_nothing_names_close_ones() -> None:
    with pytest.raises(ValueError, match=r"no item has the title 'Alein'; did you mean Alien \(1979\)"):
        parse_history("Alein", TITLES)
