import re
import subprocess
import sys

import numpy as np
import pytest
from html_page import Page

from saerec_fast.interpret import figures
from saerec_fast.interpret.examples import TopExamples
from saerec_fast.interpret.report import (
    Control,
    DataDescription,
    Interpretability,
    ModelMetrics,
    RecommendationExample,
    Recommended,
    ReportContext,
    SaeQuality,
    TrainingCurve,
    feature_cards,
    findings,
    render_report,
    write_report,
)
from saerec_fast.interpret.statistics import Estimate, FeatureStatistics, FeatureStatisticsResult, ratio

GENRES = ["Action", "Children's", "Film-Noir", "Horror", "Sci-Fi", "Western"]
SECTIONS = {
    "reading",
    "data",
    "recommender",
    "sae",
    "interpretability",
    "control",
    "recommendations",
    "features",
    "larger",
    "settings",
}


def made_up_statistics(seed=0, n_users=60, n_features=24):
    random = np.random.default_rng(seed)
    attributes = np.random.default_rng(7).random((120, len(GENRES))) < [0.3, 0.15, 0.05, 0.08, 0.12, 0.05]
    users = np.repeat(np.arange(n_users), 25)
    items = random.integers(0, 120, len(users))
    activations = random.normal(size=(len(users), n_features)) - 1.5
    activations[:, : len(GENRES)] += attributes[items] * 2.5
    activations = np.maximum(activations, 0)
    hidden = activations @ random.normal(size=(n_features, 8)) + random.normal(size=(len(users), 8))
    sae, raw = FeatureStatistics(n_features, attributes, GENRES), FeatureStatistics(8, attributes, GENRES, signed=False)
    examples = TopExamples(n_features, 8)
    sae.update_dense(activations, items, users)
    raw.update_dense(hidden, items, users)
    examples.update_dense(activations, items, users)
    return sae.result(), raw.result(), examples, attributes


@pytest.fixture(scope="module")
def context():
    sae, raw, examples, attributes = made_up_statistics()
    other_sae, other_raw, _, _ = made_up_statistics(1)
    titles = [f"Film {number} <b>&amp;</b>" for number in range(120)]
    points = [
        {
            "attribute": attribute,
            "feature": GENRES.index(attribute),
            "mode": mode,
            "positions": positions,
            "value": value,
            "share": 0.07 + reach * value,
            "ndcg@10": 0.13 - 0.01 * value,
        }
        for attribute in ("Horror", "Sci-Fi")
        for mode, positions, reach in (("set", "all", 0.1), ("add", "last", 0.04))
        for value in (0.0, 1.0, 2.0, 3.0)
    ]
    quality = {"ndcg@10": Estimate(0.132, 0.1, 0.165), "hit_rate@10": Estimate(0.24, 0.17, 0.31)}
    summary, raw_summary = sae.summary(), raw.summary()
    return ReportContext(
        title="Steering a recommender <script>alert(1)</script>",
        subtitle="Made-up numbers",
        data=DataDescription(
            "Made-up 100K",
            {"Users": 943, "Items": 1349},
            {"train": 600, "test": 142},
            dict(zip(GENRES, sae.attribute_shares.tolist(), strict=True)),
            ["333 items seen fewer than 5 times were dropped."],
        ),
        recommenders=[
            ModelMetrics("Transformer", quality),
            ModelMetrics("Popularity", {"ndcg@10": Estimate(0.019, 0.008, 0.03)}),
            ModelMetrics("Item-kNN", {"ndcg@10": Estimate(0.09, 0.07, 0.12)}),
        ],
        sae=SaeQuality(
            0.93,
            32.1,
            0.12,
            1024,
            64,
            "ReLU + L1",
            "block.0",
            {"MAE": 0.11},
            [ModelMetrics("Original", quality), ModelMetrics("Reconstruction", {"ndcg@10": Estimate(0.129)})],
        ),
        interpretability=Interpretability(
            summary,
            raw_summary,
            ratio(summary, raw_summary),
            sae.summary(features=other_sae.best_features()),
            raw.summary(features=other_raw.best_features()),
            sae,
            measured_on="all positions of 60 users",
        ),
        control=Control(points, {"Horror": {"share": 0.074, "ndcg@10": 0.132}}, ["Values are activations."]),
        recommendations=[
            RecommendationExample(
                "Horror: feature 3 set to 3",
                ["Toy Story", "Babe"],
                [Recommended("Aladdin")],
                [Recommended("Psycho", True)],
            )
        ],
        cards=feature_cards(sae, examples, summary=summary, titles=titles, item_attributes=attributes),
        training=[TrainingCurve("Recommender", {"Loss": [7.0, 6.0, 5.5], "NDCG@10": [0.02, 0.08, 0.13]})],
        settings={"Recommender": {"d_model": 64}},
        times={"Recommender": 95.2, "SAE": 12.0},
    )


def test_page_is_whole_and_stands_alone(context, tmp_path):
    path = tmp_path / "runs" / "report.html"
    write_report(path, context)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert set(page.ids) >= SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert all(value.startswith("#") for _, value in page.references)
    assert {value[1:] for _, value in page.references} <= set(page.ids)
    assert not re.search(r"url\((?!#)|@import|<link|<img", text)
    assert len(re.findall("<svg ", text)) == 2 + 1 + 6 + 2 + 1
    assert len(re.findall(r'<svg [^>]*role="img"', text)) == len(re.findall("<svg ", text))


def test_text_is_escaped(context):
    text = render_report(context)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "Film 1 <b>" not in text
    assert re.search(r"Film \d+ &lt;b&gt;&amp;amp;&lt;/b&gt;", text)


def test_missing_parts_are_left_out(context):
    text = render_report(ReportContext(title="Nothing yet", larger_sets=()))
    assert Page(text).ids == []
    assert "<section" not in text
    only_data = Page(render_report(ReportContext(title="Data only", data=context.data)))
    assert set(only_data.ids) & SECTIONS == {"data", "larger"}
    sae = ReportContext(title="SAE only", sae=SaeQuality(0.8, 10, 0.6))
    assert set(Page(render_report(sae)).ids) & SECTIONS == {"reading", "sae", "larger"}


def test_loaded_statistics_and_raw_left_out(context, tmp_path):
    result = context.interpretability.sae_result
    result.save(tmp_path)
    loaded = FeatureStatisticsResult.load(tmp_path)
    part = Interpretability(loaded.summary(), sae_result=loaded)
    text = render_report(ReportContext(title="Again", interpretability=part))
    assert "heat-map-title" in text
    assert "distribution-" not in text
    assert "Raw" not in "".join(Page(text).text)


def test_no_attributes_means_no_section():
    statistics = FeatureStatistics(3, np.zeros((4, 0), dtype=bool), [])
    statistics.update_dense(np.eye(3), [0, 1, 2], [0, 1, 2])
    result = statistics.result()
    part = Interpretability(result.summary(), sae_result=result)
    text = render_report(ReportContext(title="Bare", interpretability=part))
    assert 'id="interpretability"' not in text


def test_findings_follow_the_numbers(context):
    shows, limits = findings(context)
    joined_shows, joined_limits = " ".join(shows), " ".join(limits)
    assert "better than Popularity: NDCG@10 0.132 (0.100 to 0.165) against 0.019" in joined_shows
    assert "ranks better than Item-kNN" in joined_limits
    assert "With 142 test users" in joined_limits
    assert "Single SAE features follow attributes more closely" in joined_shows
    assert "carries over" in joined_shows
    assert "4 of 4 curves" in joined_shows
    assert "keeps 97.7% of NDCG@10" in joined_shows

    weak = ReportContext(
        title="Weak",
        recommenders=[
            ModelMetrics("Transformer", {"ndcg@10": Estimate(0.01, 0.005, 0.015)}),
            ModelMetrics("Popularity", {"ndcg@10": Estimate(0.05, 0.04, 0.06)}),
        ],
        sae=SaeQuality(0.5, 3.0, 0.9),
        control=Control(
            [
                {"attribute": "War", "feature": 1, "mode": "set", "positions": "all", "value": value, "share": share}
                | {"ndcg@10": 0.1}
                for value, share in ((0, 0.2), (1, 0.1))
            ]
        ),
        limits=["One seed only."],
    )
    shows, limits = findings(weak)
    assert shows == []
    joined_limits = " ".join(limits)
    assert "ranks worse than Popularity" in joined_limits
    assert "explains only 50.0%" in joined_limits
    assert "90.0% of the features never fire" in joined_limits
    assert "War (set, all)" in joined_limits
    assert "One seed only." in joined_limits
    render_report(weak)


@pytest.mark.parametrize(
    ("lead", "shown", "verdict"),
    [
        (Estimate(0.04, 0.01, 0.07), 0, "ranks held-out items better than Item-kNN:"),
        (Estimate(0.04, -0.01, 0.07), 1, "better than Item-kNN is not established:"),
        (Estimate(-0.04, -0.07, -0.01), 1, "ranks worse than Item-kNN:"),
    ],
)
def test_a_paired_lead_decides_where_intervals_overlap(context, lead, shown, verdict):
    model, _, neighbours = context.recommenders
    rows = [model, ModelMetrics(neighbours.name, neighbours.metrics, lead=lead)]
    text = findings(ReportContext(title="Paired", recommenders=rows))[shown][0]
    assert verdict in text
    low, value, high = (f"{abs(end):.3f}" for end in (lead.low, lead.value, lead.high))
    assert re.search(rf"on the same users a lead of −?{value} \(−?{low} to −?{high}\)", text)


@pytest.mark.parametrize(("module", "extra"), [("figures", "matplotlib"), ("report", "jinja2")])
def test_a_missing_extra_is_named(module, extra):
    code = f"import sys; sys.modules[{extra!r}] = None; import saerec_fast.interpret.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install saerec-fast[study]")


def test_cards_name_the_attribute_a_feature_was_made_for(context):
    cards = {card.feature: card for card in context.cards}
    for feature, genre in enumerate(GENRES):
        assert cards[feature].attributes[0].name == genre
        assert genre in cards[feature].examples[0].attributes
    assert feature_cards(context.interpretability.sae_result, TopExamples(24, 3), features=[5])[0].examples == []


def test_figures_are_the_same_every_time_and_refuse_nothing_to_draw(context):
    part = context.interpretability
    assert figures.heat_map(part.sae_result, part.sae) == figures.heat_map(part.sae_result, part.sae)
    with pytest.raises(ValueError, match="no control points"):
        figures.control_curves(context.control.points, "Romance")
    with pytest.raises(ValueError, match="at least one attribute"):
        figures.comparison_bars({})
    with pytest.raises(ValueError, match="statistic must be"):
        figures.comparison_bars({"SAE": part.sae}, statistic="recall")
    with pytest.raises(ValueError, match="at least one series"):
        figures.training_curve({}, title="Empty")


def test_a_silent_feature_can_be_drawn(context):
    dense = np.zeros((40, 2))
    statistics = FeatureStatistics(2, np.eye(2, dtype=bool), ["A", "B"])
    statistics.update_dense(dense, np.arange(40) % 2, np.arange(40))
    assert "0.0% fire" in figures.activation_distribution(statistics.result(), 0, "A")
