import re
import shutil
import subprocess

import pytest
from html_page import Page

from saerec_fast.study.report import StudyFacts, render_study_report, write_study_report

SECTIONS = ("sweep", "interpretability", "control", "popularity", "pairs", "cases", "browser")


def test_page_stands_alone(results, facts, tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_study_report(path, results, facts=facts)
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    places = set(page.ids) | {f"feature-{one['feature']}" for one in results["browser"]["features"]}
    assert {value for _, value in page.references if not value.startswith("#")} == {"data:,"}
    assert {value[1:] for _, value in page.references if value.startswith("#")} <= places
    assert not re.search(r"url\((?!#)|@import|<img|https?://(?!www\.w3\.org/)", text)


def test_titles_are_escaped(results, facts):
    text = render_study_report(results, facts=facts)
    assert "<script>alert" not in text
    assert "A study &lt;b&gt;" in text
    assert text.count("</script>") == 2


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_optional(results, facts, section):
    alone = render_study_report({section: results.pop(section)}, facts=StudyFacts("Bare"))
    others = render_study_report(results, facts=facts)
    name = "features" if section == "browser" else section
    assert name in Page(alone).ids
    assert name not in Page(others).ids


def test_goals_say_what_was_missed(results, facts):
    text = render_study_report(results, facts=facts)
    assert "1 of 2 goals were reached; not reached: Correlation (wanted ≥ 0.70, found 0.50)" in text


def test_chromium_shows_the_page(results, facts, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    write_study_report(tmp_path / "report.html", results, facts=facts)
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            (tmp_path / "report.html").as_uri() + "#feature-7",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    # The page's policy forbids every request: one that is tried is an error on the console.
    assert "CONSOLE" not in done.stderr
    page = done.stdout
    assert "120 of 120 features" in page
    assert '<h3 tabindex="-1">Feature 7</h3>' in page
    assert page.count("data-feature=") == 40
