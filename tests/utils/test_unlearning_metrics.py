"""Metrics of unlearning against counting, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import binomtest, norm

from utils.unlearning_metrics import (
    SETS,
    accuracy,
    agreement,
    auc,
    calibrated_share,
    distance,
    epsilon,
    figures,
    js,
    kl,
    lira,
    log_odds,
    outage,
    report,
    same_mix,
    scores,
    svc_nonmembers,
    tpr_at,
)

RNG = np.random.default_rng(0)


def probabilities(n, C=4, sharp=1.0, rng=RNG):
    z = sharp * rng.normal(size=(n, C))
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def test_auc_counts_pairs():
    a, b = RNG.integers(0, 6, 40), RNG.integers(0, 6, 30)  # with ties
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert auc(a, b) == pytest.approx(np.mean(pairs))
    assert auc(a, a) == 0.5 and auc(np.ones(5), np.ones(7)) == 0.5 and auc(b + 10, b) == 1.0
    assert math.isnan(auc(np.empty(0), b))


def test_tpr_at_a_false_positive_rate():
    a, b = RNG.normal(1, 1, 300), RNG.normal(0, 1, 200)
    for fpr in (0.0, 0.01, 0.2):
        cuts = np.r_[np.unique(np.r_[a, b]), np.inf]
        assert tpr_at(a, b, fpr) == max((a >= c).mean() for c in cuts if (b >= c).mean() <= fpr + 1e-12)


def test_epsilon_by_exact_intervals():
    """Against scipy's exact binomial test, threshold by threshold."""
    a, b = RNG.integers(2, 9, 40), RNG.integers(0, 6, 30)
    want = 0.0
    for cut in range(10):
        k, j = int((a >= cut).sum()), int((b >= cut).sum())
        low = binomtest(k, 40).proportion_ci(0.95, "exact").low
        high = binomtest(j, 30).proportion_ci(0.95, "exact").high
        want = max(want, math.log(max(low - 1e-5, 1e-12) / high))
    assert want > 0.5 and epsilon(a, b) == pytest.approx(want)
    assert epsilon(b, a) == 0 and epsilon(a, a) == 0 and math.isnan(epsilon(a, a[:0]))
    sure = epsilon(np.ones(1000), np.zeros(1000))
    assert sure == pytest.approx(math.log((0.025 ** (1 / 1000) - 1e-5) / (1 - 0.025 ** (1 / 1000))))


def test_scores_by_hand():
    p, y = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]), np.array([0, 1])
    got = scores(p, y)
    np.testing.assert_allclose(got["loss"], np.log([0.7, 0.1]), rtol=1e-9)
    np.testing.assert_allclose(got["conf"], [0.7, 0.8])
    np.testing.assert_allclose(got["entropy"], [sum(q * math.log(q) for q in row) for row in p], rtol=1e-9)
    want = [
        0.3 * math.log(0.7) + 0.2 * math.log(0.8) + 0.1 * math.log(0.9),
        0.9 * math.log(0.1) + 0.1 * math.log(0.9) + 0.8 * math.log(0.2),
    ]
    np.testing.assert_allclose(got["mentropy"], want, rtol=1e-9)


def test_thresholds_of_classes():
    """Classes whose members score on different levels: one threshold for all cannot tell them apart."""
    y = np.array([0] * 50 + [1] * 50)
    inside, outside = np.where(y == 0, 1.0, 11.0), np.where(y == 0, 0.0, 10.0)
    assert calibrated_share(inside, y, inside, y, outside, y) == 1.0
    assert calibrated_share(outside, y, inside, y, outside, y) == 0.0
    only = y == 0
    assert calibrated_share(np.array([1.0]), np.array([3]), inside[only], y[only], outside[only], y[only]) == 1.0


def test_support_vector_attack():
    sure, unsure = probabilities(300, sharp=8), probabilities(300, sharp=0.5)
    assert svc_nonmembers(sure, sure, unsure) < 0.2 and svc_nonmembers(unsure, sure, unsure) > 0.8
    assert math.isnan(svc_nonmembers(sure[:0], sure, unsure))


def test_lira_is_the_quantile_of_the_out_models():
    shadows = [RNG.normal(2, 3, 50) for _ in range(16)]
    S, phi = np.stack(shadows), RNG.normal(2, 3, 50)
    np.testing.assert_allclose(lira(phi, shadows), norm.cdf((phi - S.mean(0)) / S.std(0, ddof=1)), rtol=1e-9)
    np.testing.assert_allclose(lira(shadows[0] + 1, shadows[:1]), norm.cdf(1))
    p = np.array([[0.9, 0.1]])
    assert log_odds(p, np.array([0]))[0] == pytest.approx(math.log(9))


def test_divergences():
    p, q = probabilities(20), probabilities(20)
    assert kl(p, q) == pytest.approx(rel_entr(p, q).sum(1).mean()) and kl(p, p) == pytest.approx(0, abs=1e-12)
    assert js(p, q) == pytest.approx(js(q, p)) and 0 < js(p, q) < math.log(2)
    one = np.eye(4)
    assert js(one, one[::-1]) == pytest.approx(math.log(2))
    assert agreement(p, p) == 100 and agreement(one, one[::-1]) == 0


def test_the_same_mix_of_classes():
    labels, test = np.array([0] * 30 + [2] * 10 + [5] * 3), np.repeat([0, 1, 2], 15)
    pick = same_mix(labels, test, np.random.default_rng(0))
    assert np.bincount(test[pick], minlength=3).tolist() == [15, 0, 5]  # 3 : 1, without drawing one twice
    assert len(set(pick)) == len(pick) and not len(same_mix(np.array([7]), test, RNG))


def test_distance_and_accuracy():
    import torch

    a = {"w": torch.ones(2, 2), "x": torch.zeros(3), "mine": torch.ones(9)}
    b = {"w": torch.zeros(2, 2), "x": torch.full((3,), 2.0), "mine": torch.ones(8)}
    assert distance(a, b) == pytest.approx(4.0)
    assert accuracy(np.eye(4), np.array([0, 1, 0, 0])) == 50 and math.isnan(accuracy(np.empty((0, 4)), np.empty(0)))


def test_a_row():
    y = {s: RNG.integers(0, 4, 60) for s in SETS}
    R = {s: probabilities(60, sharp=3) for s in SETS}
    same = report(R, y, R)
    assert same["avg_gap"] == 0 and same["agree_test"] == 100 and same["kl_f"] == pytest.approx(0, abs=1e-9)
    V = dict(R, forget=np.eye(4)[y["forget"]] * 0.96 + 0.01)  # knows them by heart
    row = report(V, y, R)
    assert row["FA"] == 100 and row["FA_gap"] == pytest.approx(100 - same["FA"]) and row["RA_gap"] == 0
    assert row["mia_loss_auc"] > 0.8 and row["mia_loss_auc_gap"] == pytest.approx(
        100 * abs(row["mia_loss_auc"] - same["mia_loss_auc"])
    )
    names = ("FA_gap", "RA_gap", "TA_gap", "mia_loss_auc_gap")
    assert row["avg_gap"] == pytest.approx(np.mean([row[n] for n in names]))


def test_classes_of_a_client_alone():
    y = {"forget": [0, 1, 2], "retain": [2, 3], "forget_test": [0], "test": [0, 0, 1, 1, 2, 3, 3]}
    y = {s: np.array(v) for s, v in y.items()}
    p = {s: np.eye(4)[v] for s, v in y.items()}
    p["test"] = np.eye(4)[[0, 3, 3, 3, 2, 3, 3]]
    assert figures(p, y)["XA"] == 25 and report(p, y, dict(p, test=np.eye(4)[y["test"]]))["XA_gap"] == 75
    assert math.isnan(figures(p, dict(y, forget=np.array([2, 3, 3])))["XA"])


def test_time_without_a_usable_model():
    """Until the first that has 95 % of what retraining has, wherever it goes from there."""
    moments = [(1.0, 70.0), (3.0, 76.0), (9.0, 60.0)]
    assert outage(moments, 80.0) == 3.0 and outage(moments, 70.0) == 1.0 and outage(moments, 80.1) is None
    assert outage([(float("nan"), float("nan")), (2.0, 76.0)], 80.0) == 2.0  # nothing known of the first
