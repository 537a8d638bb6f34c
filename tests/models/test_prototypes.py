"""Class prototypes: moments against torch.cov, sampling against its law, rebalancing against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.utils.gpm import pack_triu, unpack_triu
from models.utils.prototypes import ClassStats, Prototypes, covariance_root, normalised_logits, rebalance

D = 7


def data(n=200, classes=5, start=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(start, start + classes, (n,), generator=g)
    return torch.randn(n, D, generator=g) * 2 + labels[:, None] + 50, labels


def stats(features, labels, full=False, batch=17, **options):
    s = ClassStats(3, 5, full, **options)
    for z, y in zip(features.split(batch), labels.split(batch), strict=True):
        s.add(z, y)
    return s


def split(labels, clients=4, seed=1):
    return torch.randint(clients, labels.shape, generator=torch.Generator().manual_seed(seed))


def gathered(z, y, full, owner=None, **options):
    """A server's prototypes of data split over clients."""
    owner = split(y) if owner is None else owner
    out = Prototypes(full)
    out.put((k, stats(z[owner == k], y[owner == k], full).message(**options)) for k in owner.unique().tolist())
    return out


# ---- what a client says


@pytest.mark.parametrize("full", [False, True])
def test_moments_are_torchs(full):
    z, y = data()
    s = stats(z, y, full)
    for c in range(5):
        mine = z[y == c + 3].double()
        assert s.counts[c] == len(mine)
        torch.testing.assert_close(s.means()[c], mine.mean(0), rtol=1e-12, atol=0)
        cov = torch.cov(mine.T)
        torch.testing.assert_close(s.spreads()[c], cov if full else cov.diagonal(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_the_message_holds_classes_with_enough_samples_only(full):
    z = torch.randn(8, D)
    y = torch.tensor([3, 4, 4, 6, 6, 6, 6, 7])
    message = stats(z, y, full).message()
    assert message["proto.classes"].tolist() == [4, 6]
    assert message["proto.counts"].tolist() == [2, 4]
    assert message["proto.spreads"].shape == (2, D * (D + 1) // 2 if full else D)
    if full:
        torch.testing.assert_close(unpack_triu(message["proto.spreads"])[1], torch.cov(z[3:7].T), rtol=1e-5, atol=1e-6)
    assert stats(z, y, full).message(min_samples=3)["proto.classes"].tolist() == [6]
    assert len(stats(z, y, full).message(min_samples=9)["proto.classes"]) == 0


def test_repeated_passes_count_once():
    z, y = data()
    s = stats(torch.cat([z, z, z]), torch.cat([y, y, y]), batch=600)
    message = s.message(repeats=3)
    torch.testing.assert_close(message["proto.counts"], torch.bincount(y)[3:].float())


def test_features_are_clipped_to_a_norm():
    z, y = data()
    radius = float(z.norm(dim=1).median())
    short = torch.stack([f if f.norm() <= radius else f * radius / f.norm() for f in z])
    torch.testing.assert_close(stats(z, y, clip=radius).means(), stats(short, y).means(), rtol=1e-6, atol=1e-6)


def test_noise_has_the_size_it_says():
    """Standard deviation noise * clip / n on means; noise * clip^2 / n on covariances; none without."""
    z, y = torch.randn(40, D), torch.arange(40) % 2 + 3
    calm = stats(z, y, True, clip=1.0).message()
    off = []
    for i in range(300):
        loud = stats(z, y, True, clip=1.0).message(noise=0.5, generator=torch.Generator().manual_seed(i))
        off.append(torch.cat([(loud[f"proto.{f}"] - calm[f"proto.{f}"]).flatten() for f in ("means", "spreads")]))
    off = torch.stack(off)
    assert off.shape[1] == 2 * (D + D * (D + 1) // 2)
    assert abs(float(off.std()) / (0.5 / 20) - 1) < 0.03
    assert abs(float(off.mean())) < 5 * 0.025 / math.sqrt(off.numel())


# ---- what the server makes of it


@pytest.mark.parametrize("full", [False, True])
def test_pooling_is_exact(full):
    z, y = data(400)
    pooled = gathered(z, y, full).pooled()
    assert pooled.classes.tolist() == [3, 4, 5, 6, 7] and (pooled.clients == -1).all()
    for j, c in enumerate(pooled.classes.tolist()):
        mine = z[y == c].double()
        cov = torch.cov(mine.T)
        assert pooled.counts[j] == len(mine)
        torch.testing.assert_close(pooled.means[j].double(), mine.mean(0), rtol=1e-6, atol=0)
        spread = unpack_triu(pooled.spreads)[j] if full else pooled.spreads[j]
        torch.testing.assert_close(spread.double(), cov if full else cov.diagonal(), rtol=1e-4, atol=1e-4)


def test_the_mean_of_the_mixture_is_the_class_mean():
    z, y = data(400)
    known = gathered(z, y, False)
    classes, mean, _ = known.moments()
    for j, c in enumerate(classes.tolist()):
        torch.testing.assert_close(mean[j], z[y == c].double().mean(0), rtol=1e-6, atol=0)


def test_one_clients_mixture_is_the_pooled_gaussian():
    z, y = data()
    one = gathered(z, y, False, torch.zeros_like(y))
    pooled = one.pooled()
    for a, b in zip(one.moments(), pooled.moments(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_news_of_a_class_replace_old_ones_of_the_same_client():
    z, y = data()
    known = Prototypes()
    first = stats(z[y < 6], y[y < 6]).message()
    known.put([(0, first), (1, first)])
    known.put([(0, stats(z[y > 4] + 1, y[y > 4]).message())])
    have = sorted(zip(known.clients.tolist(), known.classes.tolist(), strict=True))
    assert have == [(0, c) for c in range(3, 8)] + [(1, c) for c in range(3, 6)]
    mine = (known.clients == 0) & (known.classes == 5)
    torch.testing.assert_close(known.means[mine][0], (z[y == 5] + 1).mean(0), rtol=1e-5, atol=0)
    other = (known.clients == 1) & (known.classes == 5)
    torch.testing.assert_close(known.means[other][0], z[y == 5].mean(0), rtol=1e-5, atol=0)
    assert known.of(range(3, 5)).classes.unique().tolist() == [3, 4]
    assert len(known.of([0])) == 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_draws_follow_the_mixture(full, scale):
    """Classes uniform, moments of each class: means within 5 standard errors, variances within 5 per cent."""
    z, y = data(300)
    y[y == 3] = torch.where(torch.rand(int((y == 3).sum())) < 0.8, 7, 3)  # classes of different sizes
    known = gathered(z, y, full)
    torch.manual_seed(0)
    n = 60_000
    f, labels = known.sampler(scale)(n)
    share = torch.bincount(labels, minlength=8)[3:] / n
    assert (share - 0.2).abs().max() < 5 * math.sqrt(0.16 / n)
    for c, mean, var in zip(*known.moments(scale), strict=True):
        mine = f[labels == c].double()
        assert ((mine.mean(0) - mean).abs() / (var / len(mine)).sqrt()).max() < 5
        assert (mine.var(0) / var - 1).abs().max() < 0.05
    if full:
        one = known.of([5]).pooled()
        mine = one.sampler()(n)[0]
        torch.testing.assert_close(torch.cov(mine.T), unpack_triu(one.spreads)[0], rtol=0.1, atol=0.12)


def test_a_singular_covariance_is_drawn_from_within_its_span():
    z = torch.randn(3, D)
    known = Prototypes(full=True)
    known.put([(0, stats(z, torch.tensor([3, 3, 3]), True).message())])
    f, _ = known.sampler(floor=0.0)(100)
    basis = torch.linalg.qr((z - z.mean(0)).T[:, :2]).Q
    off = (f - z.mean(0)) - (f - z.mean(0)) @ basis @ basis.T
    assert off.norm() < 1e-2 * (f - z.mean(0)).norm()


def test_roots_of_covariances():
    """Regular, singular, rounded below zero, none at all: L L^T is S but for a millionth of its mean variance."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(4, 30, 12, generator=g, dtype=torch.float64)
    S = X.mT @ X
    S[1] = X[1, :5].T @ X[1, :5]
    S[2] = (X[2, :2].T @ X[2, :2]).float().double() - 1e-4 * torch.eye(12)
    S[3] = 0
    L = covariance_root(S, 1e-8)
    for k, tolerance in enumerate((1e-12, 2e-6, 2e-4, 2e-8)):
        mean = S[k].diagonal().mean() if k < 3 else 1
        assert (L[k] @ L[k].T - S[k]).abs().max() <= tolerance * mean + 1.1e-8, k


# ---- rebalancing


def test_normalised_logits():
    z = torch.randn(6, 10, dtype=torch.float64)
    out = normalised_logits(z, 0.1)
    torch.testing.assert_close(out.norm(dim=1), torch.full((6,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(normalised_logits(3.7 * z, 0.1), out)
    assert torch.equal(out.argmax(1), z.argmax(1))
    groups = normalised_logits(z, 0.5, [4, 6])
    for row, mine in zip(z, groups, strict=True):
        torch.testing.assert_close(mine, row / ((row[:4].norm() + row[4:].norm()) / 2) / 0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("S, least", [(10, 0.000238), (100, 0.004265), (200, 0.008772)])
def test_the_loss_of_normalised_logits_is_bounded_below(S, least):
    """Best logits of length 1/tau: a = sqrt((S-1)/S)/tau on the class, b = -1/(tau sqrt(S(S-1))) elsewhere."""
    best = torch.full((1, S), -1 / math.sqrt(S * (S - 1)))
    best[0, 0] = math.sqrt((S - 1) / S)
    loss = F.cross_entropy(normalised_logits(best, 0.1), torch.zeros(1, dtype=torch.long))
    assert abs(float(loss) - least) < 2e-6
    other = F.cross_entropy(normalised_logits(best + 0.3 * torch.randn(50, S), 0.1), torch.zeros(50, dtype=torch.long))
    assert other > loss


def test_rebalancing_is_sgd_written_out():
    """Momentum, weight decay, cosine, the draws in order: against a loop."""
    z, y = data()
    known = gathered(z, y, False)
    W, b = torch.randn(9, D), torch.randn(9)
    torch.manual_seed(3)
    settings = {"epochs": 3, "samples": 20, "batch": 25, "lr": 0.1, "wd": 0.01, "tau": 0.2, "cosine": True}
    newW, newb = rebalance(W, b, known.sampler(), range(3, 8), 5, **settings)
    assert torch.equal(newW[:3], W[:3]) and torch.equal(newW[8:], W[8:]) and torch.equal(newb[:3], b[:3])
    torch.manual_seed(3)
    draw, params, velocity = known.sampler(), [W[3:8].clone(), b[3:8].clone()], [0, 0]
    steps = 0
    for e in range(3):
        lr = 0.1 * (1 + math.cos(math.pi * e / 3)) / 2
        f, labels = draw(100)
        for i in torch.randperm(100).split(25):
            leaves = [p.clone().requires_grad_() for p in params]
            logits = f[i] @ leaves[0].T + leaves[1]
            logits = logits / logits.norm(dim=1, keepdim=True) / 0.2
            loss = -logits.log_softmax(1)[range(len(i)), labels[i] - 3].mean()
            for k, g in enumerate(torch.autograd.grad(loss, leaves)):
                velocity[k] = 0.9 * velocity[k] + g + 0.01 * params[k]
                params[k] = params[k] - lr * velocity[k]
            steps += 1
    assert steps == 12
    torch.testing.assert_close(newW[3:8], params[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(newb[3:8], params[1], rtol=1e-4, atol=1e-5)


def test_steps_are_classes_times_epochs():
    """B rows for each of S batches, S the classes that are there."""
    sizes = []

    def draw(n):
        sizes.append(n)
        return torch.randn(n, D), torch.randint(0, 4, (n,))

    before = torch.zeros(10, D)
    rebalance(before, None, draw, range(10), 4, epochs=5, samples=256, batch=256)
    assert sizes == [4 * 256] * 5


def test_a_biased_head_recovers():
    """The spec's synthetic case: a head trained on the second of two tasks; from about half right to nearly all."""
    g = torch.Generator().manual_seed(0)
    d, C = 64, 10
    centres = torch.randn(C, d, generator=g)
    y = torch.arange(2000) % C
    z = 1 + centres[y] + torch.randn(2000, d, generator=g)  # what classes have in common carries the bias
    W, b = torch.zeros(C, d), torch.zeros(C)
    new = y >= 5
    head = torch.nn.Linear(d, C)
    head.weight.data, head.bias.data = W.clone(), b.clone()
    opt = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(100):
        opt.zero_grad()
        F.cross_entropy(head(z[~new])[:, :5], y[~new]).backward()
        opt.step()
    for _ in range(100):
        opt.zero_grad()
        F.cross_entropy(head(z[new]), y[new]).backward()
        opt.step()
    W, b = head.weight.detach(), head.bias.detach()
    owner = torch.randint(5, (2000,), generator=g)
    known = Prototypes()
    for k in range(5):
        s = ClassStats(0, C)
        s.add(z[owner == k], y[owner == k])
        known.put([(k, s.message())])
    torch.manual_seed(0)
    newW, newb = rebalance(W, b, known.sampler(3.0), range(C), C, lr=0.01, cosine=True)
    assert ((z @ W.T + b).argmax(1) == y).float().mean() < 0.6
    after = (z @ newW.T + newb).argmax(1)
    assert (after == y).float().mean() > 0.95
    share = torch.bincount(after, minlength=C) / len(after)
    assert (share * (share * C).log()).sum() < 0.05


def test_packing():
    S = torch.randn(3, D, D)
    S = S + S.mT
    torch.testing.assert_close(unpack_triu(pack_triu(S)), S)
