import csv

import pytest

from saerec_fast.study.tables import study_tables, write_tables


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_parse_back_to_the_same_numbers(results, tmp_path):
    paths = {path.stem: path for path in write_tables(tmp_path / "tables", results)}
    rows = read(paths["sweep"])
    assert len(rows) == len(results["sweep"]["points"])
    for row, point in zip(rows, results["sweep"]["points"], strict=True):
        assert float(row["explained_variance"]) == point["explained_variance"]
        assert [float(row[key]) for key in ("correlation", "correlation_low", "correlation_high")] == point[
            "correlation"
        ]
        assert row["roc_auc_low"] == ""
    curve = results["control"]["curves"][0]["points"]
    assert [float(row["share"]) for row in read(paths["control_curves"])] == [point["share"] for point in curve]
    assert read(paths["popularity_features"])[0]["attributes"] == "A; B"
    assert [row["steered"] for row in read(paths["pairs"])] == ["neither", "both"]
    assert read(paths["features"])[0]["precision"] == ""


@pytest.mark.parametrize("section", ["sweep", "interpretability", "control", "popularity", "pairs"])
def test_a_missing_section_has_no_table(results, section):
    whole = set(study_tables(results))
    alone = set(study_tables({section: results[section]}))
    del results[section]
    assert alone
    assert set(study_tables(results)) == whole - alone
