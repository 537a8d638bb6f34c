"""How well a client has been forgotten: accuracies against retraining, membership inference, closeness, distance.

Everything is computed from probabilities (N, C) and labels (N,) of three models, over the same samples: O, which learnt
from all clients, R, retrained without the client, and V, which was made to forget. R is what V is measured against: for
every number the target is R's, not an ideal. Members are the client's training samples, non-members test images with
the same mix of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

EPS = 1e-12
AVERAGED = ("FA", "RA", "TA", "mia_loss_auc")  # figures whose gaps to R make the mean gap
USABLE = 0.95  # share of R's test accuracy that a usable model has


def accuracy(p: np.ndarray, y: np.ndarray) -> float:
    """In %; nan without samples."""
    return float(100 * (p.argmax(1) == y).mean()) if len(y) else float("nan")


def same_mix(labels: np.ndarray, test_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of test samples with the class mix of ``labels``, as many as there are without drawing one twice.

    Classes that the test set lacks are left out.
    """
    classes, counts = np.unique(labels, return_counts=True)
    there = np.array([(test_labels == c).sum() for c in classes])
    classes, counts, there = classes[there > 0], counts[there > 0], there[there > 0]
    if not len(classes):
        return np.empty(0, dtype=int)
    scale = min((there / counts).min(), 1.0)
    picks = [
        rng.permutation(np.flatnonzero(test_labels == c))[: max(1, round(scale * n))] for c, n in zip(classes, counts)
    ]
    return np.sort(np.concatenate(picks))


# ---------------------------------------------------------------- membership inference


def scores(p: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """What attacks look at, larger for members: (N,) each.

    loss: log p_y. confidence: max p. entropy: the negative entropy. modified entropy (Song and Mittal 2021):
    (1 - p_y) log p_y + sum_{i != y} p_i log(1 - p_i).
    """
    own = p[np.arange(len(y)), y]
    logs, rest = np.log(p + EPS), np.log(np.clip(1 - p, EPS, 1))
    others = (p * rest).sum(1) - own * rest[np.arange(len(y)), y]
    return {
        "loss": np.log(own + EPS),
        "conf": p.max(1),
        "entropy": (p * logs).sum(1),
        "mentropy": (1 - own) * np.log(own + EPS) + others,
    }


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P(score of a member > score of another), ties half; nan if one of them is empty."""
    from sklearn.metrics import roc_auc_score

    if not len(members) or not len(others):
        return float("nan")
    truth = np.r_[np.ones(len(members)), np.zeros(len(others))]
    return float(roc_auc_score(truth, np.r_[members, others]))


def tpr_at(members: np.ndarray, others: np.ndarray, fpr: float = 0.01) -> float:
    """The largest share of members above a threshold that at most a share ``fpr`` of the others is above."""
    from sklearn.metrics import roc_curve

    if not len(members) or not len(others):
        return float("nan")
    truth = np.r_[np.ones(len(members)), np.zeros(len(others))]
    false, true, _ = roc_curve(truth, np.r_[members, others], drop_intermediate=False)
    return float(true[false <= fpr + 1e-12].max())


def calibrated_share(
    score: np.ndarray, y: np.ndarray, inside: np.ndarray, y_in: np.ndarray, outside: np.ndarray, y_out: np.ndarray
) -> float:
    """Share called members by a threshold for each class, chosen on known members and non-members (Song and Mittal).

    For each class the threshold with the best balanced accuracy; classes that are missing there take that of all.
    """

    def best(a: np.ndarray, b: np.ndarray) -> float:
        cuts = np.unique(np.r_[a, b])
        right = [(a >= c).mean() + (b < c).mean() for c in cuts]
        return float(cuts[int(np.argmax(right))])

    everywhere, out = best(inside, outside), 0
    for c in np.unique(y):
        a, b = inside[y_in == c], outside[y_out == c]
        cut = best(a, b) if len(a) and len(b) else everywhere
        out += int((score[y == c] >= cut).sum())
    return out / max(len(y), 1)


def svc_nonmembers(p: np.ndarray, inside: np.ndarray, outside: np.ndarray, seed: int = 0) -> float:
    """Share of ``p`` that a support vector machine on confidences calls non-members (SalUn's and FedQUIT's attack).

    RBF kernel, C = 3, gamma auto, on max p; trained on equally many retained training and test samples.
    """
    from sklearn.svm import SVC

    rng = np.random.default_rng(seed)
    n = min(len(inside), len(outside), 2000)
    if not n or not len(p):
        return float("nan")
    a, b = (x[rng.permutation(len(x))[:n]].max(1, keepdims=True) for x in (inside, outside))
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(np.r_[a, b], np.r_[np.ones(n), np.zeros(n)])
    return float((attack.predict(p.max(1, keepdims=True)) == 0).mean())


def epsilon(members: np.ndarray, others: np.ndarray, delta: float = 1e-5, confidence: float = 0.95) -> float:
    """The epsilon that an attack shows differential privacy not to be below: max log((TPR - delta) / FPR), or 0.

    Over all thresholds, with the lower end of the Clopper-Pearson interval of TPR and the upper end of FPR's. Each
    interval holds for a threshold by itself, so the best of them is on the high side; nan without samples.
    """
    from scipy.stats import beta
    from sklearn.metrics import roc_curve

    n, m, tail = len(members), len(others), (1 - confidence) / 2
    if not n or not m:
        return float("nan")
    false, true, _ = roc_curve(np.r_[np.ones(n), np.zeros(m)], np.r_[members, others], drop_intermediate=False)
    k, j = np.rint(true * n), np.rint(false * m)
    low = np.where(k > 0, beta.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
    high = np.where(j < m, beta.ppf(1 - tail, j + 1, np.maximum(m - j, 1)), 1.0)
    return max(float(np.log(np.maximum(low - delta, EPS) / high).max()), 0.0)


def lira(phi: np.ndarray, shadows: Sequence[np.ndarray]) -> np.ndarray:
    """Offline LiRA (Carlini et al. 2022): 1 - P(an 'out' model is as confident), with a Gaussian for each sample.

    Args:
        phi: log p_y - log(1 - p_y) of the model under attack (N,). shadows: the same of models that have not seen the
            samples; with fewer than two one deviation for all samples is used. The number means little below eight.
    """
    from scipy.stats import norm

    S = np.stack(shadows)
    mean = S.mean(0)
    each = S.std(0, ddof=1) if len(S) > 1 else np.zeros_like(mean)
    spread = np.where(each > 1e-6, each, max(float(np.sqrt((each**2).mean())), 1e-6) if len(S) > 1 else 1.0)
    return norm.cdf((phi - mean) / spread)


def log_odds(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """log p_y - log(1 - p_y)."""
    own = np.clip(p[np.arange(len(y)), y].astype(np.float64), EPS, 1 - EPS)
    return np.log(own) - np.log1p(-own)


# ---------------------------------------------------------------- closeness


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) over samples, in nats."""
    p, q = p.astype(np.float64) + EPS, q.astype(np.float64) + EPS
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean()) if len(p) else float("nan")


def js(p: np.ndarray, q: np.ndarray) -> float:
    """Mean Jensen-Shannon divergence, in nats, at most log 2."""
    m = (p.astype(np.float64) + q.astype(np.float64)) / 2
    return (kl(p, m) + kl(q, m)) / 2


def agreement(p: np.ndarray, q: np.ndarray) -> float:
    """Share of samples, in %, with the same answer."""
    return float(100 * (p.argmax(1) == q.argmax(1)).mean()) if len(p) else float("nan")


def distance(a: Mapping, b: Mapping) -> float:
    """|a - b| over tensors by name, on the device of a's; entries that both have with one shape."""
    import torch

    from models.utils.merging import wide

    both = [(t, b[n]) for n, t in a.items() if n in b and t.shape == b[n].shape]
    squares = [(t.to(wide(t)) - o.to(t.device, wide(t))).square().sum() for t, o in both]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


# ---------------------------------------------------------------- a row


SETS = ("forget", "retain", "forget_test", "test")


def outage(moments: Sequence[tuple[float, float]], target: float) -> float | None:
    """Time without a usable model: from the request to the first with ``USABLE`` of the retrained one's test accuracy.

    Args:
        moments: (seconds since the request, accuracy) in order. target: of the retrained model. None: not among them.
    """
    return next((seconds for seconds, accuracy in moments if accuracy >= USABLE * target), None)


def figures(p: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What every model is measured by: FA, RA, FTA, TA, XA in %, and the AUC of the attack on the loss.

    XA is on test images of classes that the leaving clients alone have, which a model without them cannot know.

    Args:
        p, y: probabilities and labels of ``SETS``.
    """
    out = {name: accuracy(p[s], y[s]) for s, name in zip(SETS, ("FA", "RA", "FTA", "TA"))}
    theirs = np.isin(y["test"], np.setdiff1d(y["forget"], y["retain"]))
    out["XA"] = accuracy(p["test"][theirs], y["test"][theirs])
    inside, outside = (scores(p[s], y[s])["loss"] for s in ("forget", "forget_test"))
    return out | {"mia_loss_auc": auc(inside, outside)}


def attacks(p: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    """All other attacks on one model: columns mia_*. Arguments: :func:`figures`."""
    inside, outside = scores(p["forget"], y["forget"]), scores(p["forget_test"], y["forget_test"])
    out = {f"mia_{n}_auc": auc(inside[n], outside[n]) for n in inside if n != "loss"}
    out["mia_tpr01"] = tpr_at(inside["loss"], outside["loss"])
    out["mia_epsilon"] = epsilon(inside["loss"], outside["loss"])
    if len(y["retain"]) and len(y["test"]):
        known, unknown = scores(p["retain"], y["retain"]), scores(p["test"], y["test"])
        out["mia_mentropy_share"] = calibrated_share(
            inside["mentropy"], y["forget"], known["mentropy"], y["retain"], unknown["mentropy"], y["test"]
        )
        out["mia_svc"] = svc_nonmembers(p["forget"], p["retain"], p["test"], seed)
    return out


def gap(name: str, one, other):
    """How far a figure, by its name, is from another of its kind, in points; of floats or of pandas columns."""
    return abs(one - other) * (100 if name.startswith("mia") else 1)


def report(
    V: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray], R: Mapping[str, np.ndarray] | None = None, seed: int = 0
) -> dict[str, float]:
    """One model's columns: figures and attacks; with R the gaps |V - R|, their mean, KL, JS and agreement."""
    mine = figures(V, y)
    out = mine | attacks(V, y, seed)
    if R is None:
        return out
    target = figures(R, y)
    gaps = {f"{n}_gap": gap(n, v, target[n]) for n, v in mine.items()}
    out |= gaps
    out["avg_gap"] = float(np.mean([gaps[f"{n}_gap"] for n in AVERAGED]))
    return out | {
        "kl_f": kl(R["forget"], V["forget"]),
        "kl_r": kl(R["retain"], V["retain"]),
        "js_f": js(R["forget"], V["forget"]),
        "agree_f": agreement(R["forget"], V["forget"]),
        "agree_test": agreement(R["test"], V["test"]),
    }
