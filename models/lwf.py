"""Learning without Forgetting (Li and Hoiem 2017, arXiv 1606.09282).

    L = CE(f(x)_new, y) - alpha * mean_x sum_{j old} q_j log p_j,
    q, p = softmax(logits / T) of the old and the new network

The old network's answers to the new images are recorded before the task (as in the paper and in Mammoth), after the
new head has been warmed up with the rest of the network fixed. ``--lwf_official 1`` distils the columns of the current
task instead of the old ones, as fed-mammoth's released code does.
"""

from __future__ import annotations

import torch

from models.utils.continual_model import ContinualModel
from models.utils.distillation import distillation
from utils.args import add_switch, number


class Lwf(ContinualModel):
    """Distillation from the network as it was before the task, on the task's own images."""

    NAME = "lwf"
    COMPATIBILITY = ["class-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        parser.add_argument("--alpha", type=number(float, 0), default=0.5, help="weight of the distillation")
        parser.add_argument("--softmax_temp", type=number(float, 0, open_low=True), default=2.0, help="temperature T")
        add_switch(parser, "--lwf_warmup", default=1, help="train the new head alone first")
        add_switch(parser, "--lwf_official", help="distil the current task's columns, as fed-mammoth does")
        return parser

    def begin_task(self, dataset) -> None:
        if self.n_past_classes == 0:
            return
        if self.args.lwf_warmup:
            self.warm_up(dataset.train_loader)
        view = dataset.train_loader.dataset
        with torch.no_grad():
            self.net.eval()
            old = [
                self.net(self.normalization_transform(view.batch(i)[2])).cpu()
                for i in torch.arange(len(view)).split(256)
            ]
        view.logits = torch.cat(old)
        self.net.train()

    def warm_up(self, loader) -> None:
        """``n_epochs`` epochs of SGD on the classifier alone, over the columns of the task."""
        self.net.eval()
        opt = torch.optim.SGD(self.net.classifier.parameters(), lr=self.args.lr)
        for _ in range(self.args.n_epochs):
            for inputs, labels, *_ in loader:
                with torch.no_grad():
                    features = self.net(inputs, returnt="features")
                opt.zero_grad()
                self.new_class_loss(self.net.classifier(features), labels).backward()
                opt.step()

    def new_class_loss(self, outputs, labels) -> torch.Tensor:
        start, end = self.n_past_classes, self.n_seen_classes
        return self.loss(outputs[:, start:end], labels - start)

    def distillation(self, outputs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """-mean_x sum_j q_j log p_j over the columns to keep, in float32."""
        columns = (
            slice(self.n_past_classes, self.n_seen_classes) if self.args.lwf_official else slice(0, self.n_past_classes)
        )
        return distillation(outputs[:, columns], old[:, columns], self.args.softmax_temp)

    def observe(self, inputs, labels, not_aug_inputs, logits=None, epoch=None):
        self.opt.zero_grad()
        outputs = self.net(inputs)
        loss = self.new_class_loss(outputs, labels)
        if logits is not None:
            loss = loss + self.args.alpha * self.distillation(outputs, logits)
        loss.backward()
        self.opt.step()
        return loss.detach()
