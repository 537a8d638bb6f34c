"""What Soft-DTW and STAER's alignment loss cost, against a double loop over the cells with autograd.

soft_dtw    S_g of given costs (B, T, T).
divergence  D(X, Y) of (B, T, K) and constant (B, T, K) logits, with S(Y, Y).
staer       The whole alignment loss, o1 (B, T, K), o2 (B/2, T, K), stored logits of T/2, T and 2T steps. The loop
            computes three divergences of three matrices each, as the definition reads. Here S(p, p) is 'given', as a
            buffer may keep it, or 'computed', too.

The loop visits cells one by one, each a small tensor over the batch; gamma is read from a tensor for each matrix, as
modules that keep it there do. Values and gradients are compared first, in float64. Both sides run in turns in one
process; a turn is a forward pass, or that and the gradient. Medians; ratios are medians turn by turn. The aim is ten
times for the whole loss at T = 4.

    python scripts/bench/soft_dtw.py        # --device cuda --batch 32 --out results/soft_dtw.csv
"""

from pathlib import Path

import common
import torch

from models.utils.soft_dtw import alignment_loss, self_soft_dtw, soft_dtw, soft_dtw_divergence

ALPHAS = 0.5, 0.5


def loop(C, gamma):
    """The recursion as it reads."""
    B, m, n = C.shape
    g = gamma.item()
    infinite = torch.full((B,), float("inf"), dtype=C.dtype, device=C.device)
    V = [[infinite] * (n + 1) for _ in range(m + 1)]
    V[0][0] = torch.zeros(B, dtype=C.dtype, device=C.device)
    for i in range(m):
        for j in range(n):
            before = torch.stack([V[i + 1][j], V[i][j], V[i][j + 1]], 1)
            V[i + 1][j + 1] = C[:, i, j] - g * torch.logsumexp(-before / g, 1)
    return V[m][n]


def loop_divergence(X, Y, gamma):
    def S(a, b):
        return loop((a[:, :, None] - b[:, None]).square().sum(-1) / 2, gamma)

    return (S(X, Y) - S(X, X) / 2 - S(Y, Y) / 2) / ((X.shape[1] + Y.shape[1]) / 2)


def loop_alignment(o1, o2, stored, gamma):
    half = len(o2)
    terms = [
        loop_divergence(o1, stored[1], gamma).mean(),
        ALPHAS[0] * loop_divergence(o2, stored[0][:half], gamma).mean(),
        ALPHAS[1] * loop_divergence(o2, stored[2][:half], gamma).mean(),
    ]
    return sum(terms) / (1 + sum(ALPHAS))


def cases(options, dtype):
    """(part, T, variant, what is differentiated, here, the loop); both return what is summed."""
    B, K, device = options.batch, options.classes, options.device
    generator = torch.Generator().manual_seed(0)
    gamma = torch.tensor(1.0, dtype=dtype, device=device)

    def draw(*shape, grad=False):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(grad)

    for T in options.lengths:
        C = draw(B, T, T).abs().requires_grad_()
        yield "soft_dtw", T, "", [C], lambda C=C: soft_dtw(C), lambda C=C: loop(C, gamma)
    for T in options.lengths[:1]:
        X, Y = draw(B, T, K, grad=True), draw(B, T, K)
        yield (
            *("divergence", T, "", [X]),
            lambda X=X, Y=Y: soft_dtw_divergence(X, Y),
            lambda X=X, Y=Y: loop_divergence(X, Y, gamma),
        )
    for T in options.staer:
        o1, o2 = draw(B, T, K, grad=True), draw(B // 2, T, K, grad=True)
        stored = [draw(B, t, K) for t in (T // 2, T, 2 * T)]
        own = [self_soft_dtw(p) for p in stored]
        for variant, given in (("given", own), ("computed", True)):
            yield (
                *("staer", T, variant, [o1, o2]),
                lambda a=o1, b=o2, p=stored, s=given: alignment_loss(a, b, p, 1.0, *ALPHAS, stored_self=s),
                lambda a=o1, b=o2, p=stored: loop_alignment(a, b, p, gamma),
            )


def compare(options):
    """The largest differences in float64 by case, each relative to the largest entry."""
    found = {}
    for part, T, variant, inputs, here, there in cases(options, torch.float64):
        sides = [(S.detach(), *torch.autograd.grad(S.sum(), inputs)) for S in (here(), there())]
        far = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*sides))
        assert far < 1e-9, (part, T, variant, far)
        found[part, T, variant] = far
    return found


def main() -> None:
    parser = common.standard_options(__doc__, 15)
    parser.set_defaults(out="results/soft_dtw.csv")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 16, 20], help="T (default: %(default)s)")
    parser.add_argument("--staer", type=int, nargs="+", default=[2, 4, 8, 16], help="T of the whole loss (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="K (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    differences, rows = compare(options), []
    print("part        T  S(p, p)   forward, ms: here   loop  ratio   and gradient, ms: here   loop  ratio")
    for part, T, variant, inputs, here, there in cases(options, torch.float32):
        row = {"part": part, "T": T, "variant": variant, "difference": differences[part, T, variant]}
        for what, grad in (("forward", False), ("gradient", True)):

            def run(f, inputs=inputs, grad=grad):
                S = f()
                if grad:
                    torch.autograd.grad(S.sum(), inputs)

            sides = {"here": lambda _, f=here: run(f), "loop": lambda _, f=there: run(f)}
            common.in_turns(sides, 2, device=options.device)
            times = common.in_turns(sides, options.repeats, device=options.device)
            mine, theirs = times["here"]["wall"], times["loop"]["wall"]
            row |= {
                f"{what}_here_ms": common.low_and_mid(mine, 1e3)[1],
                f"{what}_loop_ms": common.low_and_mid(theirs, 1e3)[1],
                f"{what}_ratio": common.ratios(theirs, mine)[1],
            }
        print(
            f"{part:10} {T:2}  {variant:8} {row['forward_here_ms']:18.3f} {row['forward_loop_ms']:6.1f} "
            f"{row['forward_ratio']:6.1f} {row['gradient_here_ms']:24.3f} {row['gradient_loop_ms']:6.1f} "
            f"{row['gradient_ratio']:6.1f}"
        )
        rows.append({**row, "device": options.device, "threads": options.threads, "batch": options.batch})
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
