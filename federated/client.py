"""What a client owns: an id, the indices of its data, its private state and its random generator. No model."""

from __future__ import annotations

import torch

from utils.conf import derive_seed, make_generator


class Client:
    """One client during one call.

    Attributes:
        id: number of the client. task, round, call: what it is asked for (round is -1 outside the rounds).
        indices: (n,) positions of its samples of the current task in the data set's arrays.
        state: private plain data, tensors and buffers; kept by the simulator from call to call and never sent.
        generator: CPU generator seeded by (seed, task, round, client, what is called).
        seed: the same as a number, for code that draws from the global generators.
    """

    def __init__(
        self, client_id: int, dataset, indices: torch.Tensor, state: dict, args, task: int, round_: int, call: str
    ) -> None:
        self.id, self.task, self.round, self.call = client_id, task, round_, call
        self.indices, self.state, self.dataset, self.args = indices, state, dataset, args
        self.draw_as(call)

    def draw_as(self, call: str) -> None:
        """Start the draws of a call of this round, which may be another than the client is asked for."""
        keys = (self.args.seed, "client", self.task, self.round, self.id, call)
        self.seed, self.generator = derive_seed(*keys), make_generator(*keys)

    @property
    def n_samples(self) -> int:
        """Training samples of the current task."""
        return len(self.indices)

    def train_loader(self, batch_size: int | None = None):
        """Batches (inputs, labels, not_aug_inputs), shuffled and augmented by the client's generator."""
        return self.dataset.loader(
            self.indices,
            self.task,
            batch_size or self.args.batch_size,
            train=True,
            generator=self.generator,
            device=self._device,
        )

    def stat_loader(self, augment: bool = False, batch_size: int = 256, raw: bool = False):
        """Batches (inputs, labels) for a pass over the data without learning.

        Args:
            augment: shuffled and augmented as in training; otherwise in order, with the test transform.
            raw: the stored images in [0, 1], neither augmented nor normalised.
        """
        if augment:
            return ((x, y) for x, y, *_ in self.train_loader(batch_size))
        loader = self.dataset.loader(
            self.indices, self.task, batch_size, train=False, split="train", device=self._device
        )
        if raw:
            loader.dataset.transform = lambda images: images
        return loader

    @property
    def _device(self):
        from utils.conf import get_device

        return get_device(self.args.device)
