"""Class prototypes: Gaussians of features that clients send, mixtures of them on the server, and their use.

The hierarchy of HGP (arXiv 2406.02447), of which CCVR (arXiv 2106.05001) keeps one level less:

    client m, class c    N(mu_mc, Sigma_mc) with n_mc samples                                  :class:`ClassStats`
    server, class c      sum_m w_mc N(mu_mc, Sigma_mc), w_mc = n_mc / sum_j n_jc                :class:`Prototypes`
                         or, pooled, the one Gaussian with the moments of all samples           ``Prototypes.pooled``
    all classes          uniform over the classes                                              ``Prototypes.sampler``

Features drawn from it train the classifier again, without any data: :func:`rebalance`. Covariances are diagonal or
full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from federated.message import Message
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.merging import wide

FIELDS = ("classes", "counts", "means", "spreads")


class ClassStats:
    """Counts, sums and second moments of features by class, in float64, while batches stream through.

    Attributes:
        counts: (C,). sums: (C, d). squares: (C, d), or (C, d, d) where ``full``. Those of several clients add up.
    """

    def __init__(self, start: int, n_classes: int, full: bool = False, clip: float | None = None) -> None:
        """
        Args:
            start, n_classes: labels are ``start .. start + n_classes - 1``. full: keep d x d moments.
            clip: longest norm of a feature; longer ones are scaled down to it.
        """
        self.start, self.n_classes, self.full, self.clip = start, n_classes, full, clip
        self.counts = self.sums = self.squares = None

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add features (B, d) with labels (B,)."""
        labels = labels - self.start
        z = features.detach().to(wide(features))
        if self.clip is not None:
            z = z * (self.clip / z.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        C, d = self.n_classes, z.shape[1]
        self.dtype = torch.promote_types(features.dtype, torch.float32)
        if self.counts is None:
            self.counts, self.sums = z.new_zeros(C), z.new_zeros(C, d)
            self.squares = z.new_zeros((C, d, d) if self.full else (C, d))
        of_class = F.one_hot(labels, C).to(z)
        self.counts += of_class.sum(0)
        self.sums += of_class.T @ z
        if self.full:
            for c in labels.unique().tolist():
                mine = z[labels == c]
                self.squares[c].addmm_(mine.T, mine)
        else:
            self.squares += of_class.T @ z.square()

    def means(self) -> Tensor:
        """(C, d); zero where there was no sample."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def spreads(self) -> Tensor:
        """Unbiased variances (C, d) or covariances (C, d, d); zero where there were fewer than two samples."""
        n, mu = self.counts, self.means()
        if self.full:
            centred = self.squares - n[:, None, None] * mu[:, :, None] * mu[:, None, :]
        else:
            centred = (self.squares - n[:, None] * mu.square()).clamp(min=0)
        shape = (-1,) + (1,) * (centred.dim() - 1)
        return torch.where((n > 1).view(shape), centred / (n - 1).clamp(min=1).view(shape), 0)

    def message(
        self, min_samples: int = 2, repeats: int = 1, noise: float = 0.0, generator: torch.Generator | None = None
    ) -> Message:
        """What a client sends: ``proto.classes`` (k,), ``counts`` (k,), ``means`` (k, d), ``spreads`` (k, d or packed).

        Only classes with at least ``min_samples`` samples (and two, which a variance needs) are there.

        Args:
            repeats: passes over the data that were added (more moments than samples, for full covariances); counts are
                those of one pass.
            noise: standard deviation of Gaussian noise on means, in units of ``clip`` / n, and on spreads, in units of
                ``clip``^2 / n, which one sample can move them by about once (twice). No privacy accounting is done.
        """
        counts = self.counts / repeats
        keep = (counts >= max(min_samples, 2)).nonzero()[:, 0]
        n, means, spreads = counts[keep], self.means()[keep], self.spreads()[keep]
        if self.full:
            spreads = pack_triu(spreads)
        if noise:

            def draw(like: Tensor) -> Tensor:
                return torch.randn(like.shape, generator=generator).to(like) * (noise / n[:, None])

            means = means + self.clip * draw(means)
            spreads = spreads + self.clip**2 * draw(spreads)
            spreads = spreads if self.full else spreads.clamp(min=0)
        return Message(
            {
                "proto.classes": keep + self.start,
                "proto.counts": n.to(self.dtype),
                "proto.means": means.to(self.dtype),
                "proto.spreads": spreads.to(self.dtype),
            }
        )


@torch.no_grad()
def class_stats(
    method, client, full: bool = False, clip: float | None = None, passes: int = 1, raw: bool = False
) -> ClassStats:
    """Moments of the features of a client's data by class, under the network as it is, in evaluation mode.

    Args:
        method: the worker's FederatedModel. full, clip: of :class:`ClassStats`.
        passes: over the data, augmented if more than one. raw: stored images instead.
    """
    stats = ClassStats(method.n_past_classes, method.n_classes_current_task, full, clip)
    method.net.eval()
    for _ in range(passes):
        for inputs, labels in client.stat_loader(augment=passes > 1 and not raw, raw=raw):
            stats.add(method.features(inputs), labels)
    return stats


class Prototypes:
    """The Gaussians that a server holds, J of them, each of one client and one class.

    Attributes:
        clients, classes: (J,) integers. counts: (J,). means: (J, d). spreads: (J, d), or (J, d (d + 1) / 2), the upper
        triangle of covariances. In the type of the features; None as long as nothing has come.
    """

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self.clients = self.classes = self.counts = self.means = self.spreads = None

    def __len__(self) -> int:
        return 0 if self.classes is None else len(self.classes)

    def put(self, replies: Iterable[tuple[int, Message]]) -> None:
        """Take (client, reply) in; what a client says of a class replaces what it said of it before."""
        for client, reply in replies:
            mine = {f: reply[f"proto.{f}"] for f in FIELDS}
            mine["clients"] = torch.full_like(mine["classes"], client)
            if len(self):
                keep = ~((self.clients == client) & torch.isin(self.classes, mine["classes"]))
                mine = {f: torch.cat([getattr(self, f)[keep], t]) for f, t in mine.items()}
            self._set(mine)

    def _set(self, fields: dict[str, Tensor]) -> None:
        for name, t in fields.items():
            setattr(self, name, t)

    def of(self, classes: Sequence[int]) -> Prototypes:
        """Those of some classes."""
        out = Prototypes(self.full)
        if len(self):
            keep = torch.isin(self.classes, torch.as_tensor(list(classes), device=self.classes.device))
            out._set({f: getattr(self, f)[keep] for f in ("clients", *FIELDS)})
        return out

    def pooled(self) -> Prototypes:
        """One Gaussian per class with the moments of all its samples, exactly (CCVR, eq. 3 and 4); client -1.

        mu_c = sum_k n_k mu_k / N
        Sigma_c = (sum_k (n_k - 1) Sigma_k + sum_k n_k (mu_k - mu_c)(mu_k - mu_c)^T) / (N - 1)
        """
        out = Prototypes(self.full)
        if not len(self):
            return out
        classes, where = self.classes.unique(return_inverse=True)
        n = self.counts.to(wide(self.counts))
        N = n.new_zeros(len(classes)).index_add_(0, where, n)
        mu, S = self.means.to(n), self.spreads.to(n)
        mean = mu.new_zeros(len(classes), mu.shape[1]).index_add_(0, where, n[:, None] * mu) / N[:, None]
        off = mu - mean[where]
        between = pack_triu(off[:, :, None] * off[:, None, :]) if self.full else off.square()
        total = S.new_zeros(len(classes), S.shape[1])
        total.index_add_(0, where, (n - 1)[:, None] * S + n[:, None] * between)
        out._set(
            {
                "clients": torch.full_like(classes, -1),
                "classes": classes,
                "counts": N.to(self.counts),
                "means": mean.to(self.means),
                "spreads": (total / (N - 1).clamp(min=1)[:, None]).to(self.spreads),
            }
        )
        return out

    def moments(self, scale: float = 1.0, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """(classes (C,), means (C, d), variances (C, d)) of each class's mixture, variances inflated as in sampling."""
        classes, where = self.classes.unique(return_inverse=True)
        n = self.counts.double()
        w = (n / n.new_zeros(len(classes)).index_add_(0, where, n)[where])[:, None]
        mu = self.means.double()
        var = scale * (self._diagonals().double() + floor)
        first, second = (mu.new_zeros(len(classes), mu.shape[1]).index_add_(0, where, w * t) for t in (mu, var + mu**2))
        return classes, first, second - first.square()

    def _diagonals(self) -> Tensor:
        return unpack_triu(self.spreads).diagonal(dim1=-2, dim2=-1) if self.full else self.spreads

    @torch.no_grad()
    def sampler(
        self, scale: float = 1.0, floor: float = 1e-8, shrink: Tensor | None = None
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """draw(n) -> features (n, d), labels (n,): a class uniformly, a client by its samples, a feature.

        Features are mu + sqrt(scale * (Sigma + floor I)) eps, all of a draw at once.

        Args:
            shrink: (J,) factors of the means (SLCA). Draws come from the global generator of the tensors' device.
        """
        _, where = self.classes.unique(return_inverse=True)
        per_class = self.counts.new_zeros(int(where.max()) + 1).index_add_(0, where, self.counts)
        weights = self.counts / per_class[where]
        means = self.means if shrink is None else self.means * shrink[:, None].to(self.means)
        if self.full:
            roots = (scale**0.5 * covariance_root(unpack_triu(self.spreads), floor)).to(means)
        else:
            roots = (scale * (self.spreads + floor)).sqrt()

        def draw(n: int) -> tuple[Tensor, Tensor]:
            j = torch.multinomial(weights, n, replacement=True)
            if self.full:
                j = j.sort().values  # a product for each Gaussian
                parts = [
                    torch.randn(k, means.shape[1], dtype=means.dtype, device=means.device) @ roots[i].T
                    for i, k in enumerate(torch.bincount(j, minlength=len(means)).tolist())
                    if k
                ]
                return means[j] + torch.cat(parts), self.classes[j]
            return means[j] + roots[j] * torch.randn(
                n, means.shape[1], dtype=means.dtype, device=means.device
            ), self.classes[j]

        return draw


def covariance_root(S: Tensor, floor: float = 0.0) -> Tensor:
    """L (J x d x d) with L L^T = S + floor I, for covariances S (J x d x d), in float64.

    Cholesky, where it succeeds. The covariance of fewer samples than dimensions is singular and, rounded, may have
    eigenvalues below zero: 1e-6 of its mean variance is added then, which moves a draw by a thousandth of a deviation.
    What still fails gets its symmetric root by eigenvalues, those below zero set to zero.
    """
    S = S.to(wide(S))
    d = S.shape[-1]
    eye = torch.eye(d, dtype=S.dtype, device=S.device)
    roots = torch.empty_like(S)
    todo = torch.arange(len(S), device=S.device)
    for jitter in (0.0, 1e-6):
        mean = S[todo].diagonal(dim1=-2, dim2=-1).mean(-1)
        L, info = torch.linalg.cholesky_ex(S[todo] + (floor + jitter * mean)[:, None, None] * eye)
        roots[todo[info == 0]] = L[info == 0]
        todo = todo[info != 0]
        if not len(todo):
            return roots
    values, vectors = torch.linalg.eigh(S[todo])
    roots[todo] = vectors * (values.clamp(min=0) + floor).sqrt()[:, None, :] @ vectors.mT
    return roots


def normalised_logits(z: Tensor, tau: float, groups: Sequence[int] | None = None) -> Tensor:
    """z / |z| / tau by row of z (B, S): logits of one length, whose argmax is that of z (HGP; SLCA, arXiv 2303.05118).

    Args:
        groups: numbers of columns, adding up to S: the norm is the mean of the norms of these blocks (SLCA).
    """
    if groups is None:
        return z / (z.norm(dim=1, keepdim=True) + 1e-12) / tau
    norms = torch.stack([block.norm(dim=1) + 1e-7 for block in z.split(list(groups), 1)])
    return z / norms.mean(0)[:, None] / tau


def rebalance(
    weight: Tensor,
    bias: Tensor | None,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    columns: range,
    n_classes: int,
    *,
    epochs: int = 5,
    samples: int = 256,
    batch: int = 256,
    lr: float = 0.01,
    momentum: float = 0.9,
    wd: float = 0.0,
    cosine: bool = False,
    tau: float | None = 0.1,
    groups: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Train a linear classifier again on drawn features; returns its new weight and bias.

    Every epoch draws ``samples`` * ``n_classes`` features at once and takes a step of SGD for each ``batch`` of them,
    on the cross-entropy over ``columns``. Other rows come back bit for bit.

    Args:
        weight: (C, d). bias: (C,). draw: of :meth:`Prototypes.sampler`. columns: rows of the classifier to train.
        n_classes: classes that ``draw`` draws from. tau: of :func:`normalised_logits`; None: logits as they are.
        groups: ditto. cosine: rate from lr to zero over the epochs.
    """
    rows = slice(columns.start, columns.stop)
    W = weight.detach()[rows].clone().requires_grad_()
    b = None if bias is None else bias.detach()[rows].clone().requires_grad_()
    opt = torch.optim.SGD([p for p in (W, b) if p is not None], lr=lr, momentum=momentum, weight_decay=wd)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(epochs, 1)) if cosine else None
    with torch.enable_grad(), torch.autocast(W.device.type, enabled=False):
        for _ in range(epochs):
            features, labels = draw(samples * n_classes)
            order = torch.randperm(len(labels), device=labels.device)
            for i in order.split(batch):
                z = F.linear(features[i].to(W), W, b)
                z = z if tau is None else normalised_logits(z, tau, groups)
                opt.zero_grad()
                F.cross_entropy(z, labels[i] - columns.start).backward()
                opt.step()
            if schedule is not None:
                schedule.step()
    out = []
    for old, new in ((weight, W), (bias, b)):
        whole = None if old is None else old.detach().clone()
        if whole is not None:
            whole[rows] = new.detach()
        out.append(whole)
    return out[0], out[1]
