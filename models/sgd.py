"""Plain training, task after task, with nothing against forgetting: the lower bound (``finetune``)."""

from models.utils.continual_model import ContinualModel


class Sgd(ContinualModel):
    """Cross-entropy on the batch at hand."""

    NAME = "sgd"
    COMPATIBILITY = ["class-il", "domain-il", "task-il", "general-continual"]

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.loss(self.net(inputs), labels)
        loss.backward()
        self.opt.step()
        return loss.detach()
