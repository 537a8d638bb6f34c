"""Clients that lie: a trigger on their images, or labels that are off by one (``--poison``), to be forgotten later.

    backdoor   ``--poison_share`` of the images that are not of class y* get a white patch in the lower right corner and
               are taught as y*, the first class of their task
    labels     every image is taught as the next class of its task, y + 1 mod C

Who owns which sample, which task it is in and what tests compare with stay as they were: only what is taught changes.
Success of a backdoor is the share of triggered test images, none of them of class y*, that are taken for y*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasets.utils import seeded
from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.partition import Partition
from utils.errors import UserError


def stamped(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) with the trigger: a white square of a ninth of the height, at least 3 pixels."""
    images = images.clone()
    side = max(3, images.shape[-2] // 9)
    images[..., -side:, -side:] = 255
    return images


def poison(dataset: ContinualDataset, args) -> None:
    """Do to ``dataset`` what ``args.poison`` says, to the samples of ``args.poison_clients``.

    Raises:
        UserError: no clients named, or images that are not held in memory.
    """
    if not args.poison_clients:
        raise UserError(f"--poison {args.poison}: say with --poison_clients whose data")
    if not isinstance(dataset.train_images, Tensor) or dataset.SETTING != "class-il":
        raise UserError(f"--poison: not for {dataset.NAME}, only for class-il data sets that are held in memory")
    clean = Partition.make(dataset, args, exclude=())
    clean.without(args.poison_clients)  # whether there are such clients
    taught, images = dataset.train_labels.clone(), dataset.train_images.clone()
    for t in range(dataset.n_train_tasks):
        lo, hi = dataset.offsets_for_training(t)
        for k in args.poison_clients:
            mine = clean.indices(t, k)
            if args.poison == "labels":
                taught[mine] = lo + (dataset.train_labels[mine] - lo + 1) % (hi - lo)
                continue
            others = mine[dataset.train_labels[mine] != lo]
            order = seeded(args.seed, "poison", t, k).permutation(len(others))
            some = others[torch.from_numpy(order[: round(args.poison_share * len(others))])]
            images[some.to(images.device)] = stamped(images[some.to(images.device)])
            taught[some] = lo
    dataset.taught_labels, dataset.train_images = taught, images


@torch.no_grad()
def attack_success(predict, dataset: ContinualDataset, device) -> float:
    """Share in % of triggered test images that are taken for y* of their task.

    Args:
        predict: normalised images (B, C, H, W) -> predicted classes (B,).
    """
    hit = n = 0
    for t in range(dataset.n_eval_tasks):
        target = dataset.offsets_for_training(0 if dataset.joint else t)[0]
        indices = dataset.task_indices(t, train=False)
        indices = indices[dataset.eval_labels[indices].cpu() != target]
        loader = dataset.loader(indices, t, 256, False, device=device)
        loader.dataset.data = stamped(loader.dataset.images())
        for x, _ in loader if len(indices) else ():
            hit, n = hit + int((predict(x) == target).sum()), n + len(x)
    return 100 * hit / max(n, 1)
