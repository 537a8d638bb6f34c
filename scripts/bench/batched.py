"""The batched engine against the serial one: seconds per client-round, images per second, memory.

Both engines run over one server and one worker, round by round, in turns; every client trains ``--n_epochs`` epochs of
``--steps`` batches with an optimiser of its own. The sides are the serial engine and ``--clients_per_batch`` clients in
one forward and backward pass (auto: the engine's own choice). Before anything is timed a round of each, with plain SGD
from the same weights, must learn the same: ``differs`` is the norm of the difference over the norm of the update (at
most 1e-3, or 0.1 in half precision, where the order of additions shows).

    cpu      vit-pocket with LoRA, head rows and DOLFIN, for each of ``--threads``
    cuda     ViT-B/16 at 224 pixels with LoRA of rank 16 on qkv, 10 clients with batches of 16, in bf16 and in fp32, and
             all weights of vit-pocket, and task vectors in its tangent (SATA, TAK), which are mapped (vmap) where
             adapters are folded into one batch

Images are random bytes put where the data set looks for its arrays, and weights are random: nothing is downloaded. Time
is that of ``server.round``: messages, batches (with CIFAR's enlargement and augmentation), training, mean. Minimum and
median are over ``--repeats``; speed-ups are ratios of minima and medians of the ratios turn by turn, and ``cpu_saving``
is the same for the CPU time of all threads, which other load disturbs less. Peak memory is that of a round of its own:
allocated on the GPU, resident in this process on a CPU (with interpreter and libraries; Linux only). Not measured:
building, evaluation, statistics before the rounds, files, transfers between machines.

Model-FLOPs utilisation (GPU only): FLOPs of the frozen network's forward pass as ``torch.utils.flop_counter`` counts
them (a multiply-add is two), times the passes that training needs - 2 with LoRA on frozen weights: one forward, one
backward through the activations; 1 for head rows; 3 for all weights; 5 in the tangent, whose product with tau takes 2
more - times images per second, over the GPU's dense peak for the precision (``--peak_tflops`` for a GPU that PEAKS does
not know). Adapters and augmentation count as no FLOPs.

    python scripts/bench/batched.py --out batched.csv
    python scripts/bench/batched.py --device cuda --out batched_gpu.csv
"""

import shlex

import common
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.utils.base import plain_attention

POCKET = "--dataset seq-glyphs --backbone vit-pocket --optimizer adam --lr 0.001"
VIT = "--dataset seq-cifar100 --backbone vit --pretrained 0 --model fedavg --tuning lora --lora_r 16 "
VIT += "--lora_targets attn.qkv --optimizer adamw --lr 0.0003"
CASES = {  # name: (kind of device that has it by default, flags, passes that training needs)
    "vit-pocket lora": ("cpu", f"{POCKET} --model fedavg --tuning lora", 2),
    "vit-pocket head": ("cpu", f"{POCKET} --model fedavg --tuning head", 1),
    "vit-pocket dolfin": ("cpu", f"{POCKET} --model dolfin", 2),
    "vit-pocket whole": ("cuda", f"{POCKET} --model fedavg", 3),
    "vit-pocket tangent": ("cuda", f"{POCKET} --model task_arithmetic --regime linear --alpha_share 0", 5),
    "vit lora bf16": ("cuda", f"{VIT} --precision bf16", 2),
    "vit lora fp32": ("cuda", f"{VIT} --precision fp32", 2),
}
STORED = {"seq-cifar100": (32, 32)}  # images are kept smaller than what the network takes
# dense TFLOP/s in half precision and in float32 without TF32, from NVIDIA's data sheets; the first name that fits
PEAKS = {"A100": (312, 19.5), "H100 PCIe": (756, 51), "H100": (989, 67), "H200": (989, 67)}


def peak_flops(device: str, precision: str, given: float | None) -> float | None:
    """FLOP/s that the GPU could do at most, if known."""
    if given is not None:
        return given * 1e12
    name = torch.cuda.get_device_name(device)
    for known, (half, single) in PEAKS.items():
        if known.lower() in name.lower():
            if precision != "fp32":
                return half * 1e12
            return (single if torch.get_float32_matmul_precision() == "highest" else half / 2) * 1e12
    return None


def forward_flops(experiment: common.Experiment) -> int:
    """FLOPs of the frozen network, without adapters, for one image."""
    model, dataset = experiment.model, experiment.dataset
    was = None if getattr(model, "lora", None) is None else model.lora.enabled
    if was is not None:
        model.lora.disable()
    model.net.eval()
    image = torch.zeros(1, dataset.CHANNELS, *dataset.SIZE, device=model.device)
    with torch.no_grad(), plain_attention(model.net), FlopCounterMode(display=False) as counter:
        model.net(image, returnt="features")
    if was:
        model.lora.enable()
    return counter.get_total_flops()


def peak_memory(round_of, device: str) -> float | None:
    """Peak memory of one round, MB."""
    common.give_back_memory()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        round_of(0)
        return torch.cuda.max_memory_allocated(device) / 2**20
    common.peak_rss(reset=True)
    round_of(0)
    return common.peak_rss()


def proof(experiment: common.Experiment, sides: dict) -> dict[str, float]:
    """How far each side's first round is from the first side's, both with plain SGD; stops if they differ."""
    args, differs, first = experiment.args, {}, None
    kept, (args.optimizer, args.lr) = (args.optimizer, args.lr), ("sgd", 0.01)
    for side, engine in sides.items():
        experiment.rewind()
        experiment.round(engine, 0)
        weights = experiment.weights()
        first = first or weights
        differs[side] = common.update_differs(experiment.start, first, weights)
        if differs[side] > (1e-3 if args.precision == "fp32" else 0.1):
            raise SystemExit(f"{side} learns something else than the serial engine (off by {differs[side]:.1e})")
    args.optimizer, args.lr = kept
    experiment.rewind()
    return differs


def measure(name: str, options) -> list[dict]:
    """The rows of one case."""
    _, flags, passes = CASES[name]
    device = torch.device(options.device).type
    steps = options.steps or (8 if device == "cuda" else 4)
    flags += f" --vit_name {options.vit_name}" if name.startswith("vit ") else ""
    dataset = shlex.split(flags)[1]
    common.synthetic_images(
        dataset,
        n=options.clients * steps * options.batch_size,
        others=8 * options.clients,
        tests=10,
        stored=STORED.get(dataset),
    )
    args = common.settings(
        flags,
        f"--device {options.device} --num_clients {options.clients} --n_epochs {options.n_epochs}",
        f"--batch_size {options.batch_size} --partition_mode {options.partition_mode}",
    )
    experiment = common.Experiment(args)
    if (experiment.worker.net.autocast is None) != (args.precision == "fp32"):
        raise SystemExit(f"--precision {args.precision} has not reached the network")
    said = []
    sides = {"serial": experiment.engine("serial")}
    for k in options.clients_per_batch:
        sides[f"batched {k}"] = experiment.engine(
            "batched", said.append, clients_per_batch=None if k == "auto" else int(k)
        )
    flops, rows = forward_flops(experiment), []
    images = sum(experiment.sizes.values()) * args.n_epochs
    peak = peak_flops(options.device, args.precision, options.peak_tflops) if device == "cuda" else None
    for threads in options.threads if device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        differs = proof(experiment, sides)
        rounds = {side: lambda r, engine=engine: experiment.round(engine, r) for side, engine in sides.items()}
        memory = {side: peak_memory(run, options.device) for side, run in rounds.items()}  # warms up, too
        times = common.in_turns(rounds, options.repeats, device=options.device)
        for side, t in times.items():
            wall, n = t["wall"], len(experiment.sizes)
            low, mid = common.low_and_mid(wall, 1e3 / n)
            cpu = common.low_and_mid(t["cpu"], 1e3 / n)
            speedup = common.ratios(times["serial"]["wall"], wall)
            saving = common.ratios(times["serial"]["cpu"], t["cpu"])
            done = passes * flops * images / min(wall)
            engine = sides[side]
            rows.append(
                {
                    "case": name,
                    "network": args.vit_name if "vit_name" in args else args.backbone,
                    "device": torch.cuda.get_device_name(options.device) if device == "cuda" else device,
                    "precision": args.precision,
                    "threads": threads,
                    "side": side,
                    "stacked": getattr(engine, "clients_per_batch", 1) if not getattr(engine, "in_turn", None) else 1,
                    "clients": n,
                    "batch_size": args.batch_size,
                    "n_epochs": args.n_epochs,
                    "images_per_round": images,
                    "repeats": options.repeats,
                    "client_round_min_ms": low,
                    "client_round_median_ms": mid,
                    "images_per_s": round(images / min(wall), 1),
                    "speedup_min": speedup[0],
                    "speedup_median": speedup[1],
                    "cpu_min_ms": cpu[0],
                    "cpu_median_ms": cpu[1],
                    "cpu_saving_min": saving[0],
                    "cpu_saving_median": saving[1],
                    "peak_memory_mb": None if memory[side] is None else round(memory[side], 1),
                    "forward_gflops": round(flops / 1e9, 4),
                    "passes": passes,
                    "tflops_per_s": round(done / 1e12, 4),
                    "peak_tflops": None if peak is None else peak / 1e12,
                    "mfu": None if peak is None else round(done / peak, 4),
                    "differs": differs[side],
                }
            )
            show(rows[-1])
    for line in dict.fromkeys(said):
        print(f"  {line}")
    return rows


def show(row: dict) -> None:
    """One line on a row."""
    memory = f", {row['peak_memory_mb']:.0f} MB" if row["peak_memory_mb"] is not None else ""
    mfu = f", {100 * row['mfu']:.1f} % of peak" if row["mfu"] is not None else ""
    print(
        f"{row['case']:18s} {row['threads']} threads  {row['side']:12s} {row['client_round_min_ms']:9.2f} ms per "
        f"client-round (median {row['client_round_median_ms']:.2f}), {row['images_per_s']:8.1f} images/s, "
        f"x {row['speedup_min']:.2f} (median {row['speedup_median']:.2f}){memory}{mfu}",
        flush=True,
    )


def main() -> None:
    parser = common.standard_options(__doc__, repeats=7)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: those of the device")
    parser.add_argument("--clients_per_batch", nargs="+", default=["2", "5", "10", "auto"], help="numbers, or auto")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads of PyTorch (default: 1 2)")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, help="batches of a client per epoch (default: 4, on a GPU 8)")
    parser.add_argument("--n_epochs", type=int, default=1)
    parser.add_argument(
        "--partition_mode",
        choices=("iid", "distribution"),
        default="iid",
        help="equal clients, or unequal ones, so that stacks shrink towards the end (default: iid)",
    )
    parser.add_argument("--vit_name", default="vit_base_patch16_224", help="timm's name of the large network")
    parser.add_argument("--peak_tflops", type=float, help="dense peak of the GPU, for utilisation")
    options = parser.parse_args()
    kind = torch.device(options.device).type
    rows = []
    for name in options.cases or [n for n, (home, *_) in CASES.items() if home == kind]:
        rows += measure(name, options)
        common.give_back_memory()
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
