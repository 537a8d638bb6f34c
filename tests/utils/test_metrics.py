"""The metrics of a sequence against values worked out by hand and against loops written differently."""

from __future__ import annotations

import math

import numpy as np
import pytest

from utils import metrics

NAN = float("nan")
HAND = [[90, NAN, NAN], [80, 70, NAN], [60, 75, 50]]
FULL = [[90, 12, 8], [80, 70, 14], [60, 75, 50]]  # the same, also evaluated on tasks to come


@pytest.mark.parametrize("R", [HAND, FULL])
def test_by_hand(R):
    assert metrics.faa(R) == pytest.approx((60 + 75 + 50) / 3)
    assert metrics.avg_inc_acc(R) == pytest.approx((90 + 75 + 185 / 3) / 3)
    assert metrics.forgetting(R) == pytest.approx(((90 - 60) + (70 - 75)) / 2)  # the second task improved
    assert metrics.forgetting_last(R) == pytest.approx((30 - 5 + 0) / 3)
    assert metrics.backward_transfer(R) == pytest.approx((-30 + 5) / 2)


def test_forgetting_is_from_the_best_and_the_other_definition_from_the_first():
    R = [[50, NAN, NAN], [80, 60, NAN], [70, 55, 90]]
    assert metrics.forgetting(R) == pytest.approx((10 + 5) / 2)
    assert metrics.forgetting_last(R) == pytest.approx((-20 + 5 + 0) / 3)
    assert metrics.forgetting_last(R) == pytest.approx(-metrics.backward_transfer(R) * 2 / 3)


def test_forward_transfer():
    assert metrics.forward_transfer(FULL, [10, 10, 9]) == pytest.approx((2 + 5) / 2)
    assert metrics.forward_transfer(HAND, [10, 10, 9]) is None
    assert metrics.forward_transfer(FULL, None) is None


def test_micro_weights_tasks_by_their_samples():
    n = [10, 10, 80]
    assert metrics.faa_micro(HAND, n) == pytest.approx((600 + 750 + 4000) / 100)
    assert metrics.faa_micro(HAND, [7, 7, 7]) == pytest.approx(metrics.faa(HAND))
    assert metrics.faa_micro(HAND, [0, 0, 3]) == pytest.approx(50)


def test_joint_training_is_one_row():
    row = [[80, 90, 100]]
    assert metrics.faa(row) == metrics.avg_inc_acc(row) == pytest.approx(90)
    assert metrics.faa_micro(row, [0, 1, 1]) == pytest.approx(95)
    for nothing in (metrics.forgetting, metrics.forgetting_last, metrics.backward_transfer):
        assert nothing(row) is None
        assert nothing([[80]]) is None
    assert metrics.forward_transfer(row, [1, 1, 1]) is None
    assert metrics.faa([[80]]) == 80


def test_unfinished_runs_count_up_to_their_last_row():
    stopped = [[90, NAN, NAN], [80, 70, 14], [NAN, NAN, NAN]]
    assert metrics.faa(stopped) == pytest.approx(75)
    assert metrics.faa(stopped[:2]) == pytest.approx(75)
    assert metrics.forgetting(stopped) == pytest.approx(10)
    assert metrics.faa(np.full((3, 3), NAN)) is None
    assert metrics.faa_micro(np.full((3, 3), NAN), [1, 1, 1]) is None
    assert metrics.avg_inc_acc(np.full((3, 3), NAN)) is None


def test_what_was_not_evaluated_is_left_out():
    only_end = [[NAN] * 3, [NAN] * 3, [60, 75, 50]]
    assert metrics.avg_inc_acc(only_end) == metrics.faa(only_end)
    assert metrics.forgetting(only_end) is None
    assert metrics.backward_transfer(only_end) is None
    hole = [[90, NAN, NAN], [80, NAN, NAN], [60, 75, 50]]
    assert metrics.forgetting(hole) == pytest.approx(30)
    assert metrics.faa([[90, NAN], [NAN, 40]]) == 40


def test_arguments_are_checked_and_left_alone():
    with pytest.raises(ValueError, match="shape"):
        metrics.faa([1, 2, 3])
    with pytest.raises(ValueError, match="3 test counts"):
        metrics.faa_micro(HAND, [1, 2])
    R = np.array(FULL, dtype=float)
    before = R.copy()
    metrics.summary_metrics(R, R, [1, 2, 3], [1, 1, 1])
    np.testing.assert_array_equal(R, before)


def brute_force(R, n, random):
    """The definitions, one number at a time."""
    T = len(R)
    out = {"faa": 0.0, "avg_inc_acc": 0.0, "forgetting": 0.0, "forgetting_last": 0.0, "bwt": 0.0, "fwt": 0.0}
    right = sum(R[T - 1][j] * n[j] for j in range(T))
    out["faa_micro"] = right / sum(n)
    for j in range(T):
        out["faa"] += R[T - 1][j] / T
        out["forgetting_last"] += (R[j][j] - R[T - 1][j]) / T
        seen = 0.0
        for k in range(j + 1):
            seen += R[j][k]
        out["avg_inc_acc"] += seen / (j + 1) / T
    for j in range(T - 1):
        best = float("-inf")
        for i in range(j, T - 1):
            best = R[i][j] if R[i][j] > best else best
        out["forgetting"] += (best - R[T - 1][j]) / (T - 1)
        out["bwt"] += (R[T - 1][j] - R[j][j]) / (T - 1)
        out["fwt"] += (R[j][j + 1] - random[j + 1]) / (T - 1)
    return out


@pytest.mark.parametrize("T", [2, 3, 7, 20])
def test_against_brute_force(T):
    rng = np.random.default_rng(T)
    R, R_task = rng.uniform(0, 100, (2, T, T))
    n, random = rng.integers(1, 500, T), rng.uniform(0, 10, T)
    found = metrics.summary_metrics(R, R_task, n, random, random)
    expected = brute_force(R.tolist(), n.tolist(), random.tolist())
    expected |= {f"{k}_task_il": v for k, v in brute_force(R_task.tolist(), n.tolist(), random.tolist()).items()}
    assert found.keys() == expected.keys()
    assert all(type(value) is float for value in found.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_summary_without_task_identity():
    found = metrics.summary_metrics(HAND, None, [1, 1, 1])
    assert found["faa"] == pytest.approx(metrics.faa(HAND))
    assert found["fwt"] is None
    assert len(found) == 14
    assert all(value is None for name, value in found.items() if name.endswith("_task_il"))


# ---- prediction bias


def test_prediction_bias_by_hand():
    share = [0.1, 0.1, 0.5, 0.3]
    got = metrics.prediction_bias(share, 2)
    assert got["incremental_bias"] == pytest.approx(0.8 - 0.5)
    kl = sum(p * math.log(p / 0.25) for p in share) / math.log(4)
    assert got["prediction_kl"] == pytest.approx(kl)
    assert metrics.prediction_bias([0.25] * 4, 2) == {"incremental_bias": 0.0, "prediction_kl": 0.0}
    assert metrics.prediction_bias([0, 0, 0, 1.0], 3) == {"incremental_bias": 0.75, "prediction_kl": pytest.approx(1)}
    assert metrics.prediction_bias([0.5, 0.5], 0)["incremental_bias"] is None
    assert metrics.prediction_bias([1.0], 0) == {"incremental_bias": None, "prediction_kl": None}
    assert metrics.prediction_bias([float("nan")] * 3, 1) == {"incremental_bias": None, "prediction_kl": None}


def test_federated_bias_by_hand():
    even = metrics.federated_bias([0.5, 0.5], [30, 10])
    assert even["federated_bias"] == 0
    m = np.array([0.625, 0.375])
    js = 0.5 * sum(p * math.log(p / q) for r in ([0.5, 0.5], [0.75, 0.25]) for p, q in zip(r, m, strict=True))
    assert even["federated_bias_js"] == pytest.approx(js / math.log(2))
    assert metrics.federated_bias([0.75, 0.25], [30, 10])["federated_bias_js"] == pytest.approx(0)
    assert metrics.federated_bias([1.0, 0.0], [0, 5]) == {
        "federated_bias": pytest.approx(1),
        "federated_bias_js": pytest.approx(1),
    }
