import re
from xml.etree import ElementTree

import pytest

from saerec_fast.study.figures import WIDTH, study_figures, write_figures


def test_figures_are_well_formed_and_the_same_every_time(results, tmp_path):
    paths = write_figures(tmp_path, results)
    assert len(paths) == len({path.name for path in paths}) > 15
    for path, drawing in zip(paths, study_figures(results), strict=True):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert drawing.svg in path.read_text(encoding="utf-8")
        assert "http" not in drawing.svg.replace("http://www.w3.org/", "")


def test_text_stays_legible_on_a_phone(results):
    for drawing in study_figures(results):
        width = float(re.search(r"max-width:(\d+)px", drawing.svg).group(1))
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: [^;\"]*?([\d.]+)px", drawing.svg)]
        assert sizes
        assert drawing.wide or width <= WIDTH
        # Sizes are in points of the drawing. A phone of 390 px leaves 362 to a figure that shrinks.
        assert min(sizes) * 96 / 72 * (1 if drawing.wide else 362 / width) >= 11


@pytest.mark.parametrize("section", ["sweep", "interpretability", "control", "popularity", "pairs"])
def test_every_section_is_drawn_alone(results, section):
    assert study_figures({section: results[section]})


def test_nothing_to_draw():
    assert study_figures({}) == []
