"""The diagonal of the empirical Fisher matrix, sample by sample with vmap: EWC, Fisher-weighted means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from backbones.utils.base import plain_attention
from models.utils.federated_model import FederatedModel, in_place

PER_SAMPLE_FLOATS = 100_000_000  # room for the per-sample gradients of one chunk


def chunk_size(params: Mapping[str, Tensor]) -> int:
    """Samples whose gradients fit in the room there is, at most 64."""
    return max(1, min(64, PER_SAMPLE_FLOATS // max(1, sum(p.numel() for p in params.values()))))


def fisher_diagonal(
    log_likelihood: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor],
    params: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    by_likelihood: bool = True,
) -> dict[str, Tensor]:
    """sum_x p(y|x) (d log p(y|x) / d theta)^2, with the labels y of the data (fed-mammoth's and Mammoth's weighting).

    Without ``by_likelihood`` the factor p(y|x) is 1: for labels drawn from p(y|x) that is the Fisher matrix's diagonal
    itself, for those of the data the empirical one.

    Args:
        log_likelihood: (params, x (1, ...), y (1,)) -> log p(y|x), a scalar. params: {name: theta}.
        batches: (x, y) of any size; :func:`chunk_size` samples are differentiated at once.

    Returns:
        {name: sum}, not divided by the number of samples, so that sums of several data sets add up.
    """
    params = {n: p.detach() for n, p in params.items()}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    per_sample = vmap(
        grad_and_value(lambda params, x, y: log_likelihood(params, x[None], y[None])),
        in_dims=(None, 0, 0),
        randomness="same",
    )
    size = chunk_size(params)
    for inputs, labels in batches:
        for x, y in zip(inputs.split(size), labels.split(size)):
            grads, logp = per_sample(params, x, y)
            weight = logp.exp() if by_likelihood else torch.ones_like(logp)
            for name, g in grads.items():
                total[name] += torch.einsum("b,b...->...", weight, g.square())
    return total


def add_fisher_args(parser) -> None:
    """The flag of :class:`FisherPass`."""
    parser.add_argument(
        "--fisher_inputs",
        choices=("test", "raw"),
        default="test",
        help="images of the Fisher pass: normalised, or in [0, 1] as in fed-mammoth",
    )


class FisherPass(FederatedModel):
    """Mixed into a federated method: the Fisher diagonal of what it trains over one client's data."""

    def fisher(self, client) -> dict[str, Tensor]:
        """{name: F (like theta)} of one client under the weights as they are: the sum over its samples."""
        self.net.eval()
        places = self.places()

        def log_likelihood(params, x, y):
            with in_place(places, params):
                return -self.local_loss(x, y, client)[0]

        with plain_attention(self.net):
            batches = client.stat_loader(raw=self.args.fisher_inputs == "raw")
            return fisher_diagonal(log_likelihood, self.trainable(), batches)
