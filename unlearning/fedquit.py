"""FedQUIT: the leaving client distils a teacher that does not know its classes (Mora et al. 2024, arXiv 2408.07587).

    teacher   the global model's logits on D_u, in which the true class has the smallest of the sample's logits
    student   the global model, trained on D_u by KL(teacher || student)

One epoch of Adam. Afterwards rounds of the others (--recover_rounds) bring the model back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from federated.message import Message
from models.utils.unlearner import Unlearner
from utils.args import number
from utils.evaluate import evaluating


def quiet(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) in which the true class of each sample has the smallest value of the sample."""
    return logits.scatter(1, labels[:, None], logits.amin(1, keepdim=True))


class FedQUIT(Unlearner):
    NAME = "fedquit"
    ON_TASK_VECTORS = False
    TRAINING = (*Unlearner.TRAINING, "distil_quiet")

    @staticmethod
    def get_parser(parser):
        parser.add_argument("--fedquit_lr", type=number(float, 0), default=1e-4, help="rate of Adam")
        parser.add_argument("--fedquit_epochs", type=number(int, 1), default=1, help="epochs over the client's data")
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        replies = clients.only(who).call("distil_quiet", self.broadcast())
        if replies:
            self.set_trained(self.merged(self.trained(), replies, self.client_weights(replies)))

    def distil_quiet(self, message: Message, client) -> Message:
        """Client half."""
        self.begin_turn(message, client)
        trained, start = self._own_turn.trained, self.n_past_classes
        batches = [(x, y - start) for x, y, _ in client.train_loader()]
        with torch.no_grad(), evaluating(self.net):
            teacher = [quiet(self.task_logits(x), y) for x, y in batches]
        opt = torch.optim.Adam(list(trained.values()), lr=self.args.fedquit_lr)
        for _ in range(self.args.fedquit_epochs):
            for (x, _), t in zip(batches, teacher):
                opt.zero_grad()
                F.kl_div(
                    self.task_logits(x).log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True
                ).backward()
                opt.step()
        return Message(dict(trained), n_samples=client.n_samples).clone()
