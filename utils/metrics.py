"""What a run of a sequence of tasks is summarised by: pure functions of its accuracy matrix.

``R`` has shape ``(rows, T)``: ``R[i, j]`` is the accuracy, in per cent, on the test set of task ``j`` after training
on task ``i``; ``nan`` where it was not evaluated. A sequence has up to ``T`` rows (fewer, or rows of nan at the end,
while it is not finished); entries above the diagonal are of tasks not seen yet, which only forward transfer reads.
Joint training has one row on ``T`` tasks, shape ``(1, T)``: it has seen all of them at once, has a final accuracy and
neither forgets nor transfers.

Every function takes arrays or nested lists, leaves them as they are, averages over what was evaluated and
returns a float in per cent (points, for differences), or None where the quantity does not exist.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def _matrix(R: ArrayLike) -> np.ndarray:
    """``R`` as a float matrix ``(rows, T)``.

    Raises:
        ValueError: not a matrix, or more rows than tasks.
    """
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] > R.shape[1]:
        raise ValueError(f"an accuracy matrix has a row per task trained and a column per task, got shape {R.shape}")
    return R


def _is_joint(R: np.ndarray) -> bool:
    return R.shape[0] == 1 and R.shape[1] > 1


def _seen(R: np.ndarray) -> np.ndarray:
    """``R`` down to the last row evaluated, with nan on tasks not seen yet at a row (joint training has seen all)."""
    if not _is_joint(R):
        R = np.where(np.tri(*R.shape, dtype=bool), R, np.nan)
    rows = np.flatnonzero(np.isfinite(R).any(axis=1))
    return R[: rows[-1] + 1] if len(rows) else R[:0]


def _mean(values: ArrayLike) -> float | None:
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def faa(R: ArrayLike) -> float | None:
    """Final average accuracy: the mean over tasks of the last row evaluated (every task counts the same)."""
    R = _seen(_matrix(R))
    return _mean(R[-1]) if len(R) else None


def faa_micro(R: ArrayLike, n: ArrayLike) -> float | None:
    """Final accuracy over test samples: the last row weighted by the sizes ``n`` ``(T,)`` of the test sets.

    It differs from `faa` where tasks differ in size (ImageNet-R, Cars), and is what fed-mammoth calls mean accuracy.

    Raises:
        ValueError: ``n`` does not have one count per task.
    """
    R, n = _matrix(R), np.asarray(n, dtype=np.float64)
    if n.shape != R.shape[1:]:
        raise ValueError(f"expected {R.shape[1]} test counts, one per task, got shape {n.shape}")
    R = _seen(R)
    if not len(R):
        return None
    known = np.isfinite(R[-1]) & (n > 0)
    return float(np.average(R[-1, known], weights=n[known])) if known.any() else None


def avg_inc_acc(R: ArrayLike) -> float | None:
    """Average incremental accuracy (Rebuffi et al. 2017): the mean over rows of the mean over the tasks seen by then.

    Rows that were not evaluated are left out. Joint training has one row: its value is that of `faa`.
    """
    rows = [_mean(row) for row in _seen(_matrix(R))]
    return _mean([row for row in rows if row is not None])


def forgetting(R: ArrayLike) -> float | None:
    """Forgetting (Chaudhry et al. 2018): mean over the tasks before the last of best earlier accuracy minus final one.

    The best is over the rows ``j .. last - 1``, so a task that ends above its past counts as negative forgetting.
    Mammoth's function of this name also lets the last row into the maximum, which cuts such a task off at 0.
    """
    R = _seen(_matrix(R))
    if len(R) < 2:
        return None
    earlier = R[:-1, : len(R) - 1]
    best = np.where(np.isfinite(earlier), earlier, -np.inf).max(axis=0)  # -inf: never evaluated, dropped by the mean
    return _mean(best - R[-1, : len(R) - 1])


def forgetting_last(R: ArrayLike) -> float | None:
    """Forgetting as fed-mammoth logs it: mean of ``R[j, j] - R[last, j]`` over all tasks seen, the last one included.

    The last task adds a 0, so this is ``-backward_transfer * (T - 1) / T`` when every task was evaluated.
    """
    R = _seen(_matrix(R))
    return _mean(np.diagonal(R) - R[-1, : len(R)]) if len(R) > 1 else None


def backward_transfer(R: ArrayLike) -> float | None:
    """Backward transfer (Lopez-Paz & Ranzato 2017): mean over the tasks before the last of ``R[last, j] - R[j, j]``."""
    R = _seen(_matrix(R))
    return _mean((R[-1, : len(R)] - np.diagonal(R))[:-1]) if len(R) > 1 else None


def forward_transfer(R: ArrayLike, random: ArrayLike | None) -> float | None:
    """Forward transfer (Lopez-Paz & Ranzato 2017): mean over ``j >= 1`` of ``R[j - 1, j] - random[j]``.

    Args:
        random: ``(T,)`` accuracies in per cent of the network at its random initialisation; None: not measured.

    Returns:
        None too where no task was evaluated before it was learned (this needs an evaluation on future tasks).

    Raises:
        ValueError: ``random`` does not have one accuracy per task.
    """
    R = _matrix(R)
    if random is None or _is_joint(R):
        return None
    random = np.asarray(random, dtype=np.float64)
    if random.shape != R.shape[1:]:
        raise ValueError(f"expected {R.shape[1]} accuracies at random initialisation, got shape {random.shape}")
    ahead = np.diagonal(R, offset=1)
    return _mean(ahead - random[1 : 1 + len(ahead)])


def kl_from_uniform(share: ArrayLike) -> float | None:
    """KL(share || uniform) / log C for shares (C,) that add up to one: 0 for equal shares, 1 if one has all."""
    p = np.asarray(share, dtype=np.float64)
    if len(p) < 2 or not np.isfinite(p).all():
        return None
    some = p[p > 0]
    return float((some * np.log(some * len(p))).sum() / np.log(len(p)))


def prediction_share(said: ArrayLike) -> np.ndarray:
    """(C,) the share of predictions that go to each class, every class counting the same.

    Args:
        said: (C, C) how many images of a class (row) are taken for another (column); rows without images are left out.
    """
    said = np.asarray(said, dtype=np.float64)
    tested = said[said.sum(1) > 0]
    return (tested / tested.sum(1, keepdims=True)).mean(0) if len(tested) else np.full(said.shape[1], np.nan)


def prediction_bias(share: ArrayLike, past: int) -> dict[str, float | None]:
    """Where class-IL predictions go, on test images of which each seen class has as many.

    Args:
        share: (S,) the share of predictions that go to each class seen so far. past: how many classes are older than
            the current task.

    Returns:
        ``incremental_bias``, the share of the current task's classes beyond their due, in [-C_t/S, 1 - C_t/S] (HGP,
        arXiv 2406.02447, names the bias; the measure is ours), None in the first task, and ``prediction_kl``
        (:func:`kl_from_uniform`).
    """
    p = np.asarray(share, dtype=np.float64)
    new = float(p[past:].sum() - (len(p) - past) / len(p)) if 0 < past < len(p) else None
    return {"incremental_bias": new if new is None or np.isfinite(new) else None, "prediction_kl": kl_from_uniform(p)}


def federated_bias(share: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """What a client's own model prefers among the task's classes, before aggregation.

    Args:
        share: (C,) of its predictions on test images of which each class has as many. labels: (C,) its samples.

    Returns:
        ``federated_bias``, KL of the share from uniform over log C, and ``federated_bias_js``, the Jensen-Shannon
        divergence between share and label distribution over log 2: small if predictions lean where the labels do.
    """
    p, q = np.asarray(share, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    q = q / q.sum()
    m = (p + q) / 2

    def kl(a):
        some = a > 0
        return (a[some] * np.log(a[some] / m[some])).sum()

    return {"federated_bias": kl_from_uniform(p), "federated_bias_js": float((kl(p) + kl(q)) / 2 / np.log(2))}


def summary_metrics(
    class_il: ArrayLike,
    task_il: ArrayLike | None,
    n: ArrayLike,
    random: ArrayLike | None = None,
    random_task_il: ArrayLike | None = None,
) -> dict[str, float | None]:
    """All metrics of a run: keys ``faa, faa_micro, avg_inc_acc, forgetting, forgetting_last, bwt, fwt`` and, with the
    suffix ``_task_il``, the same with the task known at test time.

    Args:
        class_il: accuracy matrix ``(rows, T)`` without task identity at test time.
        task_il: the same with task identity, or None where that has no meaning (its values are None).
        n: ``(T,)`` sizes of the test sets.
        random: ``(T,)`` accuracies at random initialisation, for ``fwt``; `random_task_il` for ``fwt_task_il``.

    Raises:
        ValueError: shapes that do not fit together.
    """

    def of(R: ArrayLike | None, random: ArrayLike | None) -> dict[str, float | None]:
        if R is None:
            return dict.fromkeys(("faa", "faa_micro", "avg_inc_acc", "forgetting", "forgetting_last", "bwt", "fwt"))
        return {
            "faa": faa(R),
            "faa_micro": faa_micro(R, n),
            "avg_inc_acc": avg_inc_acc(R),
            "forgetting": forgetting(R),
            "forgetting_last": forgetting_last(R),
            "bwt": backward_transfer(R),
            "fwt": forward_transfer(R, random),
        }

    of_tasks = of(task_il, random_task_il)
    return of(class_il, random) | {f"{name}_task_il": value for name, value in of_tasks.items()}
