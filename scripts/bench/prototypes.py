"""What drawing features from prototypes costs on 768 dimensions, against ``torch.distributions.MultivariateNormal``.

``--classes`` x ``--clients`` Gaussians, 256 features per class, as one epoch of HGP's rebalancing draws them: all at
once, and as fed-mammoth writes it, a MultivariateNormal over a d x d matrix for each Gaussian, diagonal ones included.
The second side draws for ``--sample`` of the Gaussians only, its time is scaled up. Building and drawing both count,
since the mixtures are new in every round. Not measured: GPU.

    python scripts/bench/prototypes.py --out prototypes.csv
"""

import common
import torch

from models.utils.gpm import pack_triu, unpack_triu
from models.utils.prototypes import Prototypes

D, PER_CLASS = 768, 256


def mixtures(full: bool, classes: int, clients: int) -> Prototypes:
    g = torch.Generator().manual_seed(0)
    J, out = classes * clients, Prototypes(full)
    spreads = torch.rand(J, D, generator=g) + 0.1
    if full:
        X = torch.randn(J, 2 * D, D, generator=g) * spreads[:, None].sqrt()
        spreads = pack_triu(X.mT @ X / (2 * D))
    fields = {
        "classes": torch.arange(J) % classes,
        "clients": torch.arange(J) // classes,
        "counts": torch.randint(10, 60, (J,), generator=g).float(),
        "means": torch.randn(J, D, generator=g),
        "spreads": spreads,
    }
    vars(out).update(fields)
    return out


def main() -> None:
    parser = common.standard_options(__doc__, 3)
    parser.add_argument("--classes", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--sample", type=int, default=5, help="Gaussians of the other side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, full in (("diagonal", False), ("full", True)):
        known = mixtures(full, options.classes, options.clients)
        some = torch.linspace(0, len(known) - 1, options.sample).long()
        each = options.classes * PER_CLASS // len(known)  # about as many of each Gaussian
        factor = len(known) / len(some)

        def mine(_, known=known):
            return known.sampler(1.0)(options.classes * PER_CLASS)

        def theirs(_, known=known, some=some, each=each, full=full):
            for j in some.tolist():
                S = unpack_triu(known.spreads[j]) if full else torch.diag(known.spreads[j])
                S = S + 1e-8 * torch.eye(D)
                torch.distributions.MultivariateNormal(known.means[j], S).sample((each,))

        times = common.in_turns({"sampler": mine, "MultivariateNormal": theirs}, options.repeats)
        slow = [factor * t for t in times["MultivariateNormal"]["wall"]]
        low = common.low_and_mid(times["sampler"]["wall"])[0], common.low_and_mid(slow)[0]
        ratio = common.ratios(slow, times["sampler"]["wall"])[1]
        print(f"{name:9} {len(known)} Gaussians: {low[0]:7.3f} s, MultivariateNormal {low[1]:8.3f} s, x{ratio:.1f}")
        rows.append({"covariance": name, "gaussians": len(known), "mine_s": low[0], "theirs_s": low[1], "ratio": ratio})
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
