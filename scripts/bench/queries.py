"""Prompt methods with the un-prompted query of an image computed once, and with every batch.

A task of ``--rounds`` rounds, the test set of the task after each: training is one side's rounds, testing its tests,
each from nothing kept. Without augmentation in training (the pocket data sets) queries are kept in both; with it
(``--device cuda``: ViT-B/16 on random bytes in place of CIFAR-100) in tests alone. The weights that both sides end with
must agree. Sides run in turns in one process; nothing is downloaded.

    python scripts/bench/queries.py --out queries.csv
    python scripts/bench/queries.py --device cuda --out queries_gpu.csv
"""

import time

import common
import torch

from models.utils.prompt_method import PromptMethod
from utils.conf import set_random_seed
from utils.evaluate import evaluate

POOL = "--prompt_mode pool --prompt_len 4 --n_prompts 20"
METHODS = {"l2p": "", "dualprompt": "", "coda_prompt": "", "hgp": POOL}
POCKET = "--dataset seq-digits --backbone vit-pocket"
VIT = "--dataset seq-cifar100 --backbone vit --pretrained 0 --precision bf16"


def task(experiment: common.Experiment, engine, rounds: int, kept: bool, device: str) -> tuple[float, float]:
    """Seconds of training and of testing."""
    experiment.rewind()
    experiment.worker.queries().clear()
    experiment.model.queries().clear()
    PromptMethod.KEEPS_QUERIES = kept
    set_random_seed(0)
    training = testing = 0.0
    for r in range(rounds):
        start = now(device)
        experiment.round(engine, r)
        between = now(device)
        evaluate(experiment.model, experiment.dataset, [0])
        training, testing = training + between - start, testing + now(device) - between
    return training, testing


def now(device: str) -> float:
    """The clock, once the device has done its work."""
    common.synchronise(device)
    return time.perf_counter()


def main() -> None:
    parser = common.standard_options(__doc__, repeats=3)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--engine", choices=("serial", "batched"), default="serial")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda, rows = torch.device(options.device).type == "cuda", []
    if cuda:
        common.synthetic_images("seq-cifar100", n=2000, others=10, tests=1000, stored=(32, 32))
    for name in options.methods:
        flags = f"--model {name} {METHODS[name]} {VIT if cuda else POCKET}"
        setting = f"--num_clients 10 --partition_mode iid --n_epochs 1 --batch_size 16 --device {options.device}"
        experiment = common.Experiment(common.settings(flags, setting))
        engine = experiment.engine(options.engine)
        seconds, weights = {True: [], False: []}, {}
        for repeat in range(options.repeats + 1):  # the first warms up
            for kept in (True, False) if repeat % 2 else (False, True):
                took = task(experiment, engine, options.rounds, kept, options.device)
                weights[kept] = experiment.weights()
                if repeat:
                    seconds[kept].append(took)
        differs = common.update_differs(experiment.start, weights[True], weights[False])
        for i, part in enumerate(("training", "testing")):
            kept, again = ([s[i] for s in seconds[side]] for side in (True, False))
            low, high = common.low_and_mid(kept)[0], common.low_and_mid(again)[0]
            ratio = common.ratios(again, kept)
            print(
                f"{name:12} {part:9} kept {low:.3f} s, with every batch {high:.3f} s, x {ratio[0]:.2f} "
                f"(median {ratio[1]:.2f}); weights differ by {differs:.1e}",
                flush=True,
            )
            rows.append({"method": name, "part": part, "kept_s": low, "each_s": high, "ratio": ratio[1]})
            rows[-1] |= {"engine": options.engine, "device": options.device, "differs": differs}
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
