"""CODA-Prompt with distillation from the round's global model, after fed-mammoth's ``coda_lwf``.

With s the softmax of the model being trained and o that of the model the server sent, over the classes of the task:

    L = CE + beta(y) sum_{j != y} s_j log(s_j / o_j)                   distillation of the classes that are not true
    beta(y) = sum_{j != y} b_j = 1 - b_y,   b = softmax over the client's classes of the mean score of class c

Its terms are smallest at s_j = o_j / e: it bounds how far a class that is not true falls, and lets the true one rise.
The more a class draws on the task's prompts, the less its samples are held back. A client computes b once in a task,
before it first trains. The released file calls a score function that does not exist; here the score of an image is the
sum of the selection weights cos(q * a_m, k_m) of the task's components, averaged over the blocks with prompts. A client
with one class has beta 0, and CODA-Prompt's loss. So has the first step of a round, by s = o.

Without --fl the model the server sent is that of the start of the task.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.utils import client_batch
from models.coda_prompt import CodaPrompt
from models.utils.federated_model import in_place
from models.utils.merging import wide
from utils.args import number


def not_true_divergence(logits: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    """sum_{j != y} s_j log(s_j / o_j) of each sample, (B,).

    Args:
        logits, old: (B, C), of which s and o are the softmax. labels: (B,), columns of these.
    """
    s, o = F.log_softmax(logits, 1), F.log_softmax(old, 1)
    return (s.exp() * (s - o)).scatter(1, labels[:, None], 0.0).sum(1)


class CodaLwf(CodaPrompt):
    """Components for each task, held to the round's global model on the classes that are not true."""

    NAME = "coda_lwf"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        CodaPrompt.get_parser(parser)
        parser.add_argument(
            "--kd_weight", type=number(float, 0), default=1.0, help="factor of the distillation; 0: CODA-Prompt"
        )
        return parser

    # ---------------------------------------------------------------- client

    def before_local(self, message, client) -> None:
        """Keep what the server sent, and weigh the client's classes the first time in a task."""
        self._own_sent = message
        self._own_places = self.places()
        if client.state.get("task") != client.task:
            client.state.update(task=client.task, b=self.class_weights(client))

    @torch.no_grad()
    def scores(self, query: Tensor) -> Tensor:
        """Sum over the task's components of their selection weights, averaged over blocks: (B,) for queries (B, d)."""
        new = slice(self.pool.n_frozen, None)
        return torch.stack([self.pool.weights(i, query)[:, new].sum(1) for i in self.pool.blocks]).mean(0)

    def class_weights(self, client) -> Tensor:
        """b (C_t,): softmax of the mean scores of the classes that the client has, 0 for others."""
        C = self.n_classes_current_task
        total, counts = torch.zeros(2, C, device=self.device, dtype=wide(self.net.classifier.weight))
        for inputs, labels in client.stat_loader():
            labels = labels - self.n_past_classes
            total.index_add_(0, labels, self.scores(self.query(inputs)).to(total))
            counts += labels.bincount(minlength=C)
        return (total / counts).masked_fill(counts == 0, -torch.inf).softmax(0).float()

    @torch.no_grad()
    def teacher(self, inputs: Tensor) -> Tensor:
        """Logits (B, C_t) of the model the server sent, for the queries that were matched last."""
        with in_place(self._own_places, self._own_sent):
            return self.head(self.net(inputs, returnt="features"))

    def local_loss(self, inputs, labels, client) -> Tensor:
        y = labels - self.n_past_classes
        logits = self.head(self.prompted(inputs)[0])
        ce = F.cross_entropy(logits, y, reduction="none")
        if not self.args.kd_weight:
            return ce
        stacked = client if isinstance(client, tuple) else (client,)
        b = client_batch.per_sample(torch.stack([c.state["b"] for c in stacked]), len(y))
        beta = 1 - b.gather(1, y[:, None])[:, 0]
        return ce + self.args.kd_weight * beta * not_true_divergence(logits, self.teacher(inputs), y)
