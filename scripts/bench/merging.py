"""What closed-form merging costs on the shapes of ViT-B/16, against the released way of doing it.

merge    One block (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), ``--clients`` clients: this project's merge, and the formula
         with ``torch.linalg.pinv`` in float64 over d x d matrices, as fed-mammoth writes it. RegMean on whole weights,
         LoRM's A and B steps, alpha 0.5; LoRM's A step with diagonals against the same with d x d matrices.
step     A client's training step of LoRM on a whole ViT-B/16 without pretrained weights: adapters beside frozen layers,
         and a loop that makes W0 + B A for all 48 layers at every step and differentiates through it.
memory   Peak resident memory of one round's Grams (A step) of ``--clients`` clients and their merge: diagonals, and
         d x d matrices. Each in a process of its own; what the process held before is subtracted.

Both sides run in turns in one process. Targets: the merge at least 5 times as fast. Not measured: GPU.

    python scripts/bench/merging.py --out merging.csv        # --part merge --threads 2 --batch 4
"""

import json
import subprocess
import sys

import common
import torch
from torch.func import functional_call

from backbones.utils.lora import LoRA
from backbones.utils.moments import InputMoments
from backbones.vit import as_backbone
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.merging import merge_layers, reduced_gram, scale_off_diagonal
from models.utils.task_lora import VIT_TARGETS

D, BLOCK = 768, {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
R, ALPHA = 16, 0.5


def vit_b16():
    import timm

    torch.manual_seed(0)
    return as_backbone(timm.create_model("vit_base_patch16_224", num_classes=0), 10)


def rows(part, what, times, mine, theirs, **more):
    """One line of the table: both sides' seconds and how many times as fast this project's is."""
    low = {n: common.low_and_mid(t["wall"]) for n, t in times.items()}
    ratio = common.ratios(times[theirs]["wall"], times[mine]["wall"])
    row = {"part": part, "what": what, "mine_s": low[mine][0], "theirs_s": low[theirs][0], "ratio": ratio[1], **more}
    print(f"{part:7} {what:34} {mine} {low[mine][0]:8.3f} s   {theirs} {low[theirs][0]:8.3f} s   x{ratio[1]:.1f}")
    return row


def bench_merge(options):
    g = torch.Generator().manual_seed(0)
    out = []
    X = {n: torch.randn(options.clients, 4 * d, d, generator=g) for n, (_, d) in BLOCK.items()}
    grams = [{n: x[i].T @ x[i] for n, x in X.items()} for i in range(options.clients)]
    del X

    def weights(rows_of):
        return [{n: torch.randn(*rows_of(o, d), generator=g) for n, (o, d) in BLOCK.items()} for _ in grams]

    def pinv(W, G, A=None):
        """The released formula: sums in float64 of d x d Grams, one layer at a time."""
        merged = {}
        for n in BLOCK:
            wide = [scale_off_diagonal(x[n].double(), ALPHA) for x in G]
            if A is None:
                merged[n] = sum(w[n].double() @ x for w, x in zip(W, wide)) @ torch.linalg.pinv(sum(wide))
            else:
                a = A[n].double()
                merged[n] = sum(w[n].double() @ a @ x for w, x in zip(W, wide)) @ a.T
                merged[n] = merged[n] @ torch.linalg.pinv(a @ sum(wide) @ a.T)
        return merged

    A = {n: torch.randn(R, d, generator=g) / d**0.5 for n, (_, d) in BLOCK.items()}
    H = [{n: reduced_gram(A[n], scale_off_diagonal(x[n], ALPHA)) for n in BLOCK} for x in grams]
    diagonals = [{n: x[n].diagonal().clone() for n in BLOCK} for x in grams]
    whole, As, Bs = weights(lambda o, d: (o, d)), weights(lambda o, d: (R, d)), weights(lambda o, d: (o, R))
    cases = {
        "RegMean, whole weights": (lambda: merge_layers(whole, grams, alpha=ALPHA), lambda: pinv(whole, grams)),
        "LoRM, A step": (lambda: merge_layers(As, grams, alpha=ALPHA), lambda: pinv(As, grams)),
        "LoRM, B step (r x r)": (lambda: merge_layers(Bs, H), lambda: pinv(Bs, grams, A)),
        "LoRM, A step, diagonals": (
            lambda: merge_layers(As, diagonals),
            lambda: pinv(As, [{n: torch.diag(x[n]) for n in BLOCK} for x in diagonals]),
        ),
    }
    for what, (mine, theirs) in cases.items():
        a, b = mine(), theirs()
        worst = max(float((a[n].double() - b[n]).norm() / b[n].norm()) for n in BLOCK)
        assert worst < 1e-4, (what, worst)
        times = common.in_turns({"merge": lambda _, f=mine: f(), "pinv": lambda _, f=theirs: f()}, options.repeats)
        out.append(rows("merge", what, times, "merge", "pinv", difference=worst))
    return out


def bench_step(options):
    net = vit_b16().eval()
    net.requires_grad_(False)
    lora = LoRA(net, VIT_TARGETS, R, share_A=True)
    for _, _, _, B in lora:
        torch.nn.init.normal_(B, std=1e-3)
    head = net.classifier.requires_grad_(True)
    x, y = torch.randn(options.batch, 3, 224, 224), torch.arange(options.batch) % 10
    trained = [*(B for _, _, _, B in lora), *head.parameters()]
    for _, _, A, _ in lora:
        A.requires_grad_(False)
    grads = {}

    def finish(side, loss):
        grads[side] = torch.autograd.grad(loss, trained)

    def mine(_):
        lora.enable()
        finish("hooks", torch.nn.functional.cross_entropy(net(x), y))

    def theirs(_):
        lora.disable()
        merged = {f"{n}.weight": net.get_submodule(n).weight + B @ A for n, _, A, B in lora}
        finish("rebuild", torch.nn.functional.cross_entropy(functional_call(net, merged, (x,)), y))

    mine(0), theirs(0)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(grads["hooks"], grads["rebuild"]))
    assert worst < 1e-3, worst
    times = common.in_turns({"hooks": mine, "rebuild": theirs}, options.repeats)
    return [rows("step", f"B step, batch {options.batch}", times, "hooks", "rebuild", difference=worst)]


def memory_child(kind, options):
    net = vit_b16().eval()
    layers = [f"blocks.{i}.{n}" for i in range(12) for n in BLOCK]
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        net(x)
        common.give_back_memory()
        before = common.resident()
        common.peak_rss(reset=True)
        replies, sent = [], 0
        for _ in range(options.clients):
            moments = InputMoments(net, layers, diagonal=kind == "diagonal")
            with moments:
                net(x)
            packed = {n: S if S.dim() == 1 else pack_triu(S) for n, S in moments.sums.items()}
            sent = sum(4 * S.numel() for S in packed.values())
            replies.append(packed)
            del moments
        As = [{n: torch.randn(R, net.get_submodule(n).in_features) for n in layers} for _ in replies]
        grams = [{n: S if kind == "diagonal" else unpack_triu(S) for n, S in r.items()} for r in replies]
        merge_layers(As, grams, alpha=ALPHA)
    print(json.dumps({"peak_mb": common.peak_rss() - before, "sent_mb": sent / 1e6}))


def bench_memory(options):
    found = {}
    for kind in ("diagonal", "dense"):
        command = [sys.executable, __file__, "--child", kind, "--clients", str(options.memory_clients)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    ratio = found["dense"]["peak_mb"] / found["diagonal"]["peak_mb"]
    print(
        f"memory  {options.memory_clients} clients, 48 layers: diagonal {found['diagonal']['peak_mb']:.0f} MB, "
        f"dense {found['dense']['peak_mb']:.0f} MB, x{ratio:.0f}; a client sends "
        f"{found['diagonal']['sent_mb']:.2f} MB and {found['dense']['sent_mb']:.0f} MB"
    )
    return [{"part": "memory", "what": kind, **values, "ratio": ratio} for kind, values in found.items()]


def main() -> None:
    parser = common.standard_options(__doc__, 3)
    parser.add_argument("--part", choices=("merge", "step", "memory"), nargs="+", default=["merge", "step", "memory"])
    parser.add_argument("--clients", type=int, default=10, help="of the merge (default: %(default)s)")
    parser.add_argument("--memory_clients", type=int, default=3, help="of the memory part (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images of a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--child", choices=("diagonal", "dense"), help="for the script itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        memory_child(options.child, options)
        return
    out = []
    for part in options.part:
        out += {"merge": bench_merge, "step": bench_step, "memory": bench_memory}[part](options)
    common.write(options.out, out)


if __name__ == "__main__":
    main()
