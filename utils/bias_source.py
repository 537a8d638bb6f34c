"""Where a prediction bias sits: in the classifier or in the features under it.

HGP (arXiv 2406.02447) says that with prompts it sits in the classifier. To see it, the network's features are given two
classifiers that cannot be biased by the order of tasks or by clients, since they see as many images of every class: the
nearest class mean, and logistic regression. What bias is left with them is the features' (the measure is ours).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from utils.evaluate import EVAL_BATCH, evaluating, evaluation_batches
from utils.metrics import prediction_bias, prediction_share

PER_CLASS = 100  # training images of a class at most


@torch.no_grad()
def _features(model, batches) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and labels (n,) of all batches (inputs, labels)."""
    of = getattr(model, "features", None) or model.net.features
    pairs = [(of(x).float().cpu(), y.cpu()) for loader in batches for x, y in loader]
    return tuple(torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))


def bias_source(model, dataset, after: int) -> dict[str, float | None]:
    """``prediction_bias`` and accuracy in % with balanced classifiers on the network's features, after task ``after``.

    Returns:
        ``<head>_accuracy`` (mean over classes), ``<head>_incremental_bias`` and ``<head>_prediction_kl``, for the heads
        ``ncm`` (nearest class mean) and ``probe`` (logistic regression on standardised features).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tasks, seen = range(after + 1), model.n_seen_classes
    labels = dataset.train_labels.cpu()
    own = [dataset.task_indices(t, train=True) for t in tasks]
    fewest = min(PER_CLASS, min(int(n) for i in own for n in labels[i.cpu()].unique(return_counts=True)[1]))
    some = [torch.cat([i[labels[i.cpu()] == c][:fewest] for c in labels[i.cpu()].unique()]) for i in own]
    balanced = [
        dataset.loader(i, t, EVAL_BATCH, train=False, split="train", device=model.device) for t, i in zip(tasks, some)
    ]
    with evaluating(model):
        Z, y = _features(model, balanced)
        V, v = _features(model, (evaluation_batches(dataset, t, model.device) for t in tasks))

    out: dict[str, float | None] = {}
    heads = {"ncm": NearestCentroid(), "probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))}
    for name, head in heads.items():
        with warnings.catch_warnings():  # features that no image of a class has (a dead unit) are no news here
            warnings.filterwarnings("ignore", "self.within_class_std_dev_")
            predicted = head.fit(Z, y).predict(V)
        said = np.zeros((seen, seen))
        np.add.at(said, (v, predicted), 1)
        tested = said[said.sum(1) > 0]
        out[f"{name}_accuracy"] = 100 * float((said.diagonal()[said.sum(1) > 0] / tested.sum(1)).mean())
        for key, value in prediction_bias(prediction_share(said), model.n_past_classes).items():
            out[f"{name}_{key}"] = value
    return out
