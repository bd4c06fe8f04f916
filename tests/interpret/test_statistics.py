import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import pearsonr
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from saerec_fast.interpret import statistics as statistics_module
from saerec_fast.interpret.statistics import Estimate, FeatureStatistics, FeatureStatisticsResult, ratio
from saerec_fast.types import SparseFeatures

NAMES = ["Action", "Comedy", "Drama"]


def to_features(dense):
    matrix = sparse.csr_matrix(dense)
    return SparseFeatures(
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices.astype(np.int32)),
        torch.from_numpy(matrix.data.astype(np.float32)),
        dense.shape[1],
        (dense.shape[0],),
    )


def made_up(seed=0, rows=400, n_features=12, n_items=60, n_users=30, negative=False):
    """Sparse activations with many ties; features 0, 1 and 2 lean on the attributes, the last one never fires."""
    random = np.random.default_rng(seed)
    attributes = random.random((n_items, len(NAMES))) < 0.3
    items = random.integers(0, n_items, rows)
    users = random.integers(0, n_users, rows)
    dense = np.round(random.normal(size=(rows, n_features)), 1)
    dense[:, : len(NAMES)] += attributes[items, :n_features]
    dense = dense if negative else np.maximum(dense, 0)
    dense[:, -1] = 0
    return dense.astype(np.float32), attributes, items, users


def compute(dense, attributes, items, users, *, batches=1, **options):
    statistics = FeatureStatistics(dense.shape[1], attributes, NAMES[: attributes.shape[1]], **options)
    for rows in np.array_split(np.arange(len(dense)), batches):
        statistics.update(to_features(dense[rows]), items[rows], users[rows])
    return statistics.result()


def assert_same(first, second):
    for name, value in vars(first).items():
        if isinstance(value, np.ndarray) and not name.startswith("_"):
            np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)


@pytest.mark.parametrize("negative", [False, True])
def test_against_scipy_and_sklearn(negative):
    dense, attributes, items, users = made_up(negative=negative)
    result = compute(dense, attributes, items, users)
    labels = attributes[items]
    for feature in range(dense.shape[1] - 1):
        score = dense[:, feature].astype(np.float64)
        for attribute in range(len(NAMES)):
            label = labels[:, attribute]
            at = feature, attribute
            assert result.correlation[at] == pytest.approx(pearsonr(score, label).statistic, abs=1e-12)
            assert result.roc_auc[at] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
            assert result.mean_given_attribute[at] == pytest.approx(score[label].mean(), abs=1e-12)
            assert result.recall[at] == pytest.approx((score[label] > 0).mean())
            assert result.precision[at] == pytest.approx(label[score > 0].mean())
            assert result.fired_attribute_counts[at] == (label & (score > 0)).sum()
        assert result.firing_rate[feature] == pytest.approx((score > 0).mean())
        assert result.mean[feature] == pytest.approx(score.mean(), abs=1e-12)
        assert result.mean_when_fired[feature] == pytest.approx(score[score > 0].mean())
        assert (result.maximum[feature], result.minimum[feature]) == (score.max(), score.min())
        np.testing.assert_allclose(result.quantiles[feature], np.quantile(score[score != 0], [0.5, 0.9, 0.99]))
    np.testing.assert_array_equal(result.attribute_counts, labels.sum(0))


def test_working_in_chunks_changes_nothing(monkeypatch):
    dense, attributes, items, users = made_up(negative=True)
    whole = compute(dense, attributes, items, users)
    monkeypatch.setattr(statistics_module, "_CHUNK_ENTRIES", 500)
    monkeypatch.setattr(statistics_module, "_MAX_BOOTSTRAP_ELEMENTS", 5000)
    chunked = compute(dense, attributes, items, users)
    assert_same(whole, chunked)
    low, expected = chunked.summary().mean_max_correlation.low, whole.summary().mean_max_correlation.low
    assert low == pytest.approx(expected, abs=1e-12)


def test_threshold_moves_what_has_fired():
    dense, attributes, items, users = made_up()
    result = compute(dense, attributes, items, users, threshold=0.5)
    fired = dense > 0.5
    np.testing.assert_array_equal(result.fired_counts, fired.sum(0))
    expected = [fired[attributes[items][:, one]].mean(0) for one in range(len(NAMES))]
    np.testing.assert_allclose(result.recall, np.transpose(expected))


def test_precision_and_recall_at_a_threshold_that_activations_equal():
    dense, attributes, items, users = made_up()
    dense = np.round(dense * 4) / 4
    assert (dense == 0.5).any()
    result = compute(dense, attributes, items, users, batches=7, threshold=0.5)
    for feature in np.flatnonzero(result.fired_counts):
        for attribute in range(len(NAMES)):
            label, predicted = attributes[items][:, attribute], dense[:, feature] > 0.5
            assert result.precision[feature, attribute] == pytest.approx(precision_score(label, predicted))
            assert result.recall[feature, attribute] == pytest.approx(recall_score(label, predicted))


def test_zero_entries_of_topk_encoders_count_as_silent():
    dense, attributes, items, users = made_up()
    full = SparseFeatures(
        torch.arange(len(dense) + 1) * dense.shape[1],
        torch.arange(dense.shape[1]).repeat(len(dense)),
        torch.from_numpy(dense.reshape(-1)),
        dense.shape[1],
        (len(dense),),
    )
    statistics = FeatureStatistics(dense.shape[1], attributes, NAMES)
    statistics.update(full, items, users)
    assert_same(statistics.result(), compute(dense, attributes, items, users))


def test_dense_path_equals_sparse_path():
    dense, attributes, items, users = made_up(negative=True)
    statistics = FeatureStatistics(dense.shape[1], attributes, NAMES)
    statistics.update_dense(torch.from_numpy(dense), torch.from_numpy(items), torch.from_numpy(users))
    assert_same(statistics.result(), compute(dense, attributes, items, users))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    dense, attributes, items, users = made_up()
    hidden = torch.from_numpy(np.round(dense * 4) / 4).to(dtype)
    statistics = FeatureStatistics(dense.shape[1], attributes, NAMES)
    statistics.update_dense(hidden, items, users)
    expected = compute(hidden.float().numpy(), attributes, items, users)
    assert_same(statistics.result(), expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    n_features=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    auc_rows=st.sampled_from([1, 7, 20, 500]),
    auc_entries=st.sampled_from([1, 9, 30, 1000]),
)
def test_any_batch_split_gives_the_same(seed, rows, n_features, cuts, auc_rows, auc_entries):
    dense, attributes, items, users = made_up(seed, rows, n_features, n_items=6, n_users=4, negative=seed % 2 == 0)
    options = {"auc_rows": auc_rows, "auc_entries": auc_entries, "max_groups": 3}
    whole = compute(dense, attributes, items, users, **options)
    statistics = FeatureStatistics(n_features, attributes, NAMES, **options)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        statistics.update(to_features(dense[part]), items[part], users[part])
    split = statistics.result()
    assert_same(whole, split)
    assert whole.summary(resamples=20).as_dict() == split.summary(resamples=20).as_dict()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 25))
def test_bounds_and_agreement_on_tiny_data(seed, rows):
    dense, attributes, items, users = made_up(seed, rows, 4, n_items=5, n_users=3, negative=seed % 2 == 0)
    result = compute(dense, attributes, items, users)
    labels = attributes[items]
    for attribute in range(len(NAMES)):
        label = labels[:, attribute]
        if label.all() or not label.any():
            assert np.isnan(result.correlation[:, attribute]).all()
            assert np.isnan(result.roc_auc[:, attribute]).all()
            continue
        for feature in range(4):
            assert result.roc_auc[feature, attribute] == pytest.approx(roc_auc_score(label, dense[:, feature]))
            constant = np.ptp(dense[:, feature]) == 0
            expected = 0 if constant else np.corrcoef(dense[:, feature].astype(float), label)[0, 1]
            assert result.correlation[feature, attribute] == pytest.approx(expected, abs=1e-9)
            assert result.constant[feature] == constant


def test_constant_features_and_missing_attributes_are_noted():
    dense, attributes, items, users = made_up()
    dense[:, 3] = 0.1
    attributes[:, 1] = False
    result = compute(dense, attributes, items, users)
    np.testing.assert_array_equal(result.correlation[[3, -1]][:, [0, 2]], 0)
    np.testing.assert_array_equal(result.roc_auc[[3, -1]][:, [0, 2]], 0.5)
    assert np.isnan(result.correlation[:, 1]).all()
    assert np.isnan(result.precision[-1]).all()
    summary = result.summary()
    assert [one.attribute for one in summary.attributes] == ["Action", "Drama"]
    assert summary.left_out == [("Comedy", 0.0)]
    assert any("constant" in note for note in summary.notes)
    assert any("Comedy" in note for note in summary.notes)
    assert result.best_features().correlation[1] == -1


def test_no_attributes_at_all():
    dense, _, items, users = made_up()
    result = compute(dense, np.zeros((60, 0), dtype=bool), items, users)
    summary = result.summary()
    assert summary.attributes == []
    assert summary.as_dict()["mean_max_correlation"] is None


def test_rare_attributes_are_left_out_with_their_shares():
    dense, attributes, items, users = made_up(rows=1000)
    attributes[:, 2] = False
    attributes[items[0], 2] = True
    result = compute(dense, attributes, items, users)
    summary = result.summary(minimum_share=0.05)
    assert [one.attribute for one in summary.attributes] == ["Action", "Comedy"]
    assert summary.left_out == [("Drama", pytest.approx((items == items[0]).mean()))]
    assert any("Drama" in note and "5.0%" in note for note in summary.notes)


def test_summary_is_the_mean_of_maxima():
    dense, attributes, items, users = made_up(negative=True)
    signed = compute(dense, attributes, items, users)
    free = compute(dense, attributes, items, users, signed=False)
    assert signed.summary(resamples=0).mean_max_correlation == Estimate(signed.correlation.max(0).mean())
    assert signed.summary().mean_max_roc_auc.value == pytest.approx(signed.roc_auc.max(0).mean())
    assert free.summary().mean_max_correlation.value == pytest.approx(np.abs(free.correlation).max(0).mean())
    mirrored = np.maximum(free.roc_auc, 1 - free.roc_auc)
    assert free.summary().mean_max_roc_auc.value == pytest.approx(mirrored.max(0).mean())
    assert any("sign" in note for note in free.summary().notes)


def test_sign_free_statistics_do_not_change_when_a_dimension_is_flipped():
    dense, attributes, items, users = made_up(negative=True)
    flipped = dense * np.where(np.arange(dense.shape[1]) % 2, 1, -1).astype(np.float32)
    first = compute(dense, attributes, items, users, signed=False).summary()
    second = compute(flipped, attributes, items, users, signed=False).summary()
    assert first.mean_max_correlation.value == pytest.approx(second.mean_max_correlation.value)
    assert first.mean_max_roc_auc.value == pytest.approx(second.mean_max_roc_auc.value)
    assert first.mean_max_correlation.low == pytest.approx(second.mean_max_correlation.low)


def test_features_chosen_elsewhere():
    first = compute(*made_up(0, negative=True), signed=False)
    dense, attributes, items, users = made_up(1, negative=True)
    dense[:, :3] *= -1
    other = compute(dense, attributes, items, users, signed=False)
    chosen = first.best_features()
    summary = other.summary(features=chosen)
    assert summary.selected
    expected = chosen.correlation_sign * other.correlation[chosen.correlation, np.arange(3)]
    assert [one.correlation.value for one in summary.attributes] == pytest.approx(list(expected))
    # A sign chosen elsewhere is kept, so the mirrored dimensions measure below zero and below 1/2.
    assert summary.mean_max_correlation.value < 0
    assert summary.mean_max_roc_auc.value < 0.5
    assert summary.mean_max_correlation.low < summary.mean_max_correlation.high


def test_choosing_among_noise_is_optimistic_and_measuring_elsewhere_is_not():
    random = np.random.default_rng(0)
    attributes = random.random((50, 3)) < 0.3

    def noise(seed):
        random = np.random.default_rng(seed)
        dense = np.maximum(random.normal(size=(600, 60)), 0).astype(np.float32)
        return compute(dense, attributes, random.integers(0, 50, 600), random.integers(0, 40, 600))

    chosen_here = noise(1).summary()
    assert chosen_here.mean_max_correlation.value > 0.07
    assert chosen_here.bootstrap_bias > 0.01
    assert chosen_here.mean_max_correlation.low < chosen_here.mean_max_correlation.value - chosen_here.bootstrap_bias
    elsewhere = noise(2).summary(features=noise(1).best_features()).mean_max_correlation
    assert elsewhere.low < 0.02
    assert abs(elsewhere.value) < 0.05


def test_intervals_narrow_with_users_and_mostly_cover():
    random = np.random.default_rng(3)
    attributes = random.random((80, 3)) < 0.3

    def sample(seed, n_users):
        random = np.random.default_rng(seed)
        users = np.repeat(np.arange(n_users), 20)
        items = random.integers(0, 80, len(users))
        noise = random.normal(size=(len(users), 3)) + 0.7 * random.normal(size=(n_users, 3))[users]
        dense = np.maximum(attributes[items] * 1.5 + noise, 0).astype(np.float32)
        return compute(dense, attributes, items, users).summary(resamples=200)

    truth = sample(0, 4000)
    covered = covered_auc = 0
    widths = []
    for seed in range(1, 31):
        summary = sample(seed, 40)
        estimate, auc = summary.mean_max_correlation, summary.mean_max_roc_auc
        covered += estimate.low <= truth.mean_max_correlation.value <= estimate.high
        covered_auc += auc.low <= truth.mean_max_roc_auc.value <= auc.high
        widths.append((estimate.high - estimate.low, auc.high - auc.low))
    assert covered >= 24
    assert covered_auc >= 24
    large = sample(99, 200)
    for narrow, wide in zip(
        (large.mean_max_correlation, large.mean_max_roc_auc), np.transpose(widths).mean(1), strict=True
    ):
        assert 0.3 * wide < narrow.high - narrow.low < 0.65 * wide


def test_many_users_share_groups():
    dense, attributes, items, _ = made_up(rows=900)
    users = np.arange(900)
    result = compute(dense, attributes, items, users, max_groups=50)
    assert result.n_users == 900
    apart = compute(dense, attributes, items, users, max_groups=900)
    np.testing.assert_allclose(result.correlation, apart.correlation)
    grouped, single = result.summary().mean_max_correlation, apart.summary().mean_max_correlation
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.35)


def test_memory_budget_gives_up_intervals_not_sums():
    dense, attributes, items, users = made_up()
    bounded = compute(dense, attributes, items, users, memory_budget=1000)
    np.testing.assert_allclose(bounded.correlation, compute(dense, attributes, items, users).correlation, atol=1e-12)
    summary = bounded.summary()
    assert summary.mean_max_correlation.low is None
    assert any("memory_budget" in note for note in summary.notes)


def test_sampled_rows_are_flagged_and_close():
    dense, attributes, items, users = made_up(rows=6000)
    full = compute(dense, attributes, items, users)
    sampled = compute(dense, attributes, items, users, auc_rows=1500, batches=9)
    assert not full.sampled
    assert sampled.sampled
    assert sampled.n_auc_rows == 1500
    np.testing.assert_array_equal(sampled.correlation, full.correlation)
    np.testing.assert_allclose(sampled.roc_auc, full.roc_auc, atol=0.06)
    assert np.abs(sampled.roc_auc - full.roc_auc).max() > 0
    assert any("1,500 of 6,000" in note for note in sampled.summary().notes)


def test_activations_beyond_a_number_are_sampled_by_whole_rows(monkeypatch):
    monkeypatch.setattr(statistics_module, "_CHUNK_ENTRIES", 64)  # so that the kept rows are cut back while they come
    dense, attributes, items, users = made_up(rows=6000)
    per_row = (dense != 0).sum(1)
    full = compute(dense, attributes, items, users)
    sampled = compute(dense, attributes, items, users, auc_entries=7000, batches=9)
    assert 7000 - per_row.max() < len(sampled._entries.rows) <= 7000
    assert sampled.n_auc_rows == pytest.approx(7000 / per_row.mean(), rel=0.05)
    assert sampled.sampled
    np.testing.assert_array_equal(sampled.correlation, full.correlation)
    np.testing.assert_allclose(sampled.roc_auc, full.roc_auc, atol=0.08)
    one = compute(dense[per_row > 2], attributes, items[per_row > 2], users[per_row > 2], auc_entries=1, batches=9)
    assert one.n_auc_rows == 1

    statistics = FeatureStatistics(dense.shape[1], attributes, NAMES, auc_entries=700)
    for rows in np.array_split(np.arange(len(dense)), 200):
        statistics.update(to_features(dense[rows]), items[rows], users[rows])
        assert sum(len(part[-1]) for part in statistics._kept) <= 700 * 1.25


def test_ratio_is_paired():
    dense, attributes, items, users = made_up(rows=2000)
    sharp = dense.copy()
    sharp[:, :3] = np.maximum(sharp[:, :3] - 0.7, 0) + attributes[items]
    first = compute(sharp, attributes, items, users).summary()
    second = compute(dense, attributes, items, users, signed=False).summary()
    estimate = ratio(first, second)
    assert estimate.value == pytest.approx(first.mean_max_correlation.value / second.mean_max_correlation.value)
    assert 1 < estimate.low < estimate.value < estimate.high
    assert ratio(first, compute(*made_up(5)).summary()).low is None
    itself = ratio(first, first)
    assert (itself.low, itself.high) == pytest.approx((1, 1))


def test_activations_top_features_and_saving(tmp_path):
    dense, attributes, items, users = made_up()
    result = compute(dense, attributes, items, users)
    present, absent = result.activations(0, "Comedy")
    label = attributes[items][:, 1]
    np.testing.assert_array_equal(present, dense[label, 0])
    np.testing.assert_array_equal(absent, dense[~label, 0])
    top = result.top_features("Comedy", 4)
    assert top == list(np.argsort(-result.correlation[:, 1], kind="stable")[:4])
    result.save(tmp_path)
    loaded = FeatureStatisticsResult.load(tmp_path)
    assert_same(result, loaded)
    assert loaded.summary().mean_max_correlation == Estimate(result.summary().mean_max_correlation.value)
    with pytest.raises(ValueError, match="holds no activations"):
        loaded.activations(0, 0)
    with pytest.raises(ValueError, match="no attribute 'Western'"):
        result.top_features("Western")


def test_errors():
    dense, attributes, items, users = made_up()
    statistics = FeatureStatistics(dense.shape[1], attributes, NAMES)
    with pytest.raises(ValueError, match="no rows"):
        statistics.result()
    with pytest.raises(ValueError, match="expected activations of 12 features"):
        statistics.update(to_features(dense[:, :3]), items, users)
    with pytest.raises(ValueError, match="400 rows"):
        statistics.update(to_features(dense), items[:5], users)
    with pytest.raises(ValueError, match=r"item indices must lie in \[0, 60\)"):
        statistics.update(to_features(dense), items + 60, users)
    with pytest.raises(ValueError, match="finite"):
        statistics.update_dense(np.full_like(dense, math.nan), items, users)
    with pytest.raises(ValueError, match="12 dimensions"):
        statistics.update_dense(dense[:, :3], items, users)
    with pytest.raises(ValueError, match="attributes must have shape"):
        FeatureStatistics(3, attributes, NAMES[:2])
    with pytest.raises(ValueError, match="without an interval"):
        Estimate(1.0).overlaps(Estimate(2.0))
    assert Estimate(1.0, 0.5, 1.5).overlaps(Estimate(1.6, 1.4, 1.8))
    statistics.update(to_features(dense[:0]), items[:0], users[:0])
    assert statistics.n_rows == 0
