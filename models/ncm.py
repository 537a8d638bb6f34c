"""Nearest class mean on frozen features: the reference that needs no gradient and does not forget.

Clients send the sum of their features and the number of samples of each class, which add up exactly; the server's
means do not depend on how the data is split (Mensink et al. 2013; FedNCM, Legate et al. 2023).
"""

from __future__ import annotations

import torch

from backbones.utils.head import need_bias
from federated.message import Message
from models.utils.federated_model import FederatedModel


class Ncm(FederatedModel):
    """argmin_c |f(x) - mu_c|^2, written as the linear classifier 2 mu_c^T f - |mu_c|^2."""

    NAME = "ncm"
    COMPATIBILITY = ["class-il", "task-il"]

    def __init__(self, backbone, loss, args, transform, dataset=None):
        need_bias(backbone.classifier)
        backbone.requires_grad_(False)
        super().__init__(backbone, loss, args, transform, dataset)

    def begin_rounds(self, clients) -> None:
        total = clients.sum("class_sums", self.broadcast())
        means = total["sums"] / total["counts"].clamp(min=1)[:, None]
        start, end = self.n_past_classes, self.n_seen_classes
        head = self.net.classifier
        weight, bias = head.weight.data.clone(), head.bias.data.clone()
        weight[start:end], bias[start:end] = 2 * means, -means.square().sum(1)
        head.weight.data, head.bias.data = weight, bias

    def round(self, clients, r: int) -> None:
        """Nothing is trained."""

    @torch.no_grad()
    def class_sums(self, message: Message, client) -> Message:
        """Sum of features (C, d) and counts (C,) of the task's classes over this client's images."""
        self.net.eval()
        start, n = self.n_past_classes, self.n_classes_current_task
        sums = torch.zeros(n, self.net.classifier.in_features, device=self.device)
        counts = torch.zeros(n, device=self.device)
        for inputs, labels in client.stat_loader():
            sums.index_add_(0, labels - start, self.net(inputs, returnt="features").float())
            counts += torch.bincount(labels - start, minlength=n)
        return Message(sums=sums, counts=counts)
