"""Fine-tuning of a spiking network, without anything against forgetting: STAER's lower bound."""

from __future__ import annotations

from models.utils.spiking import SpikingModel


class SpikingSgd(SpikingModel):
    """Cross-entropy over all classes, of mean logits or at every time step."""

    NAME = "spiking-sgd"

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.classification(self.net.sequence(inputs), labels)
        loss.backward()
        self.opt.step()
        return loss.detach()
