"""Pretrain the small ViT that ships with the project, on letters that no shipped benchmark contains.

    python scripts/pretrain_vit_pocket.py               # needs the fonts that build_glyphs.py needs
    python scripts/pretrain_vit_pocket.py --eval_only   # the table of the model card, from the shipped weights

The network classifies letters that are neither digits, nor among the 100 of seq-glyphs, nor in a script of seq-scripts,
nor similar to one of those. Images are rendered anew for every batch by one worker process. The head is thrown away.
Training needs torch 2.9 or later (Muon), timm, scikit-learn, scipy, Pillow and fontTools.
"""

import argparse
import io
import json
import lzma
import math
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from glyph_rendering import letter_or_digit, load_masters, render, split_letters
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 128, "depth": 4, "num_heads": 4}


def vit_pocket(num_classes):
    # timm's default initialisation had learned nothing after tens of thousands of images; 'jax' does.
    return VisionTransformer(**SHAPE, num_classes=num_classes, weight_init="jax")


class Letters(torch.utils.data.IterableDataset):
    """Endless batches of freshly rendered letters; letters are drawn evenly, then one of a letter's faces."""

    def __init__(self, masters, batch_size, seed):
        self.fields = torch.from_numpy(masters.fields)
        self.thinnest, self.gap = (torch.from_numpy(a.astype(np.float32)) for a in (masters.thinnest, masters.gap))
        self.faces = torch.from_numpy(np.bincount(masters.owner))
        self.starts = torch.cumsum(self.faces, 0) - self.faces
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < self.batch_size:
                order = torch.cat([order, torch.randperm(len(self.faces), generator=generator)])
            letters, order = order[: self.batch_size], order[self.batch_size :]
            face = (torch.rand(len(letters), generator=generator) * self.faces[letters]).long()
            rows = self.starts[letters] + face
            images = render(self.fields[rows], self.thinnest[rows], self.gap[rows], generator)
            yield (images[:, None] - 0.5) / 0.5, letters


def train(args):
    masters = load_masters(args.font_dirs, letter_or_digit)
    letters = split_letters(masters, args.split_seed)[2]
    masters = masters.subset(letters)
    print(f"{len(letters)} letters in {len(masters.owner)} drawings", flush=True)
    torch.manual_seed(args.seed)
    net = vit_pocket(len(letters))
    cycles = []
    if args.continue_from:
        state = torch.load(args.continue_from, weights_only=True)
        net.load_state_dict(state["net"])
        cycles = state["cycles"]
    seen = sum(cycle["images"] for cycle in cycles)
    cycles.append({"images": 0, "lr": args.lr, "batch_size": args.batch_size, "seed": args.seed, "minutes": 0.0})
    # Muon on the matrices of the blocks, AdamW on the rest: learned sooner than AdamW alone (no controlled comparison).
    hidden = [p for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    others = [p for n, p in net.named_parameters() if not (n.startswith("blocks.") and p.ndim == 2)]
    opts = [
        torch.optim.Muon(hidden, lr=2 * args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    steps = args.images // args.batch_size
    warm_up = min(500, steps // 10)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            opt,
            lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warm_up) / (steps - warm_up))),
        )
        for opt in opts
    ]
    stream = Letters(masters, args.batch_size, args.seed + 1000 + seen)
    batches = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8))
    begin, losses, hits = time.time(), [], []
    for step in range(1, steps + 1):
        images, labels = next(batches)
        logits = net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for stepped in (*opts, *schedules):
            stepped.step()
        losses.append(loss.item())
        hits.append((logits.argmax(1) == labels).float().mean().item())
        if step % 200 == 0 or step == steps:
            print(
                f"step {step}/{steps}  loss {np.mean(losses[-200:]):.3f}  accuracy {np.mean(hits[-200:]):.3f}  "
                f"{step * args.batch_size / (time.time() - begin):.0f} images/s",
                flush=True,
            )
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            cycles[-1].update(images=step * args.batch_size, minutes=(time.time() - begin) / 60)
            torch.save({"net": net.state_dict(), "cycles": cycles}, args.checkpoint)
    recipe = {
        "letters": len(letters),
        "drawings": len(masters.owner),
        "cycles": cycles,
        "split_seed": args.split_seed,
        "optimizer": "Muon (twice the learning rate, weight decay 0.05) on the matrices of the blocks, AdamW "
        "(betas 0.9 0.98, no weight decay) on the rest",
        "schedule": "cosine to zero after 10 % of warm-up (500 steps at most)",
        "label_smoothing": 0.1,
        "clip_grad_norm": 1.0,
        "torch": torch.__version__,
    }
    weights = {k: v.half().contiguous() for k, v in net.state_dict().items() if not k.startswith("head.")}
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        weights,
        args.weights,
        metadata={
            "architecture": json.dumps(SHAPE),
            "recipe": json.dumps(recipe),
            "seed": str(args.seed),
            "licence": LICENCE,
            "images_seen": str(seen + cycles[-1]["images"]),
            "input": "(x / 255 - 0.5) / 0.5, white ink on black",
        },
    )


def shipped_data(path):
    """{name: (x_train, y_train, x_test, y_test)}, the images uint8."""
    with lzma.open(path) as file:
        data = np.load(io.BytesIO(file.read()), allow_pickle=False)
    suites = {
        name: tuple(data[f"{name}_{part}"] for part in ("x_train", "y_train", "x_test", "y_test"))
        for name in ("glyphs", "scripts")
    }
    digits = load_digits()
    images = torch.tensor(digits.images)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", antialias=True)[:, 0].round().byte().numpy()
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return {**suites, "digits": (x_train, y_train, x_test, y_test)}


@torch.no_grad()
def features(net, images):
    images = (torch.from_numpy(images)[:, None].float() / 255 - 0.5) / 0.5
    return torch.cat([net.forward_features(chunk)[:, 0] for chunk in images.split(512)]).numpy()


def nearest_class_mean(x_train, y_train, x_test, y_test):
    means = torch.from_numpy(np.stack([x_train[y_train == c].mean(0) for c in range(y_train.max() + 1)]))
    return 100 * float((torch.cdist(torch.from_numpy(x_test), means).argmin(1).numpy() == y_test).mean())


def linear_probe(x_train, y_train, x_test, y_test):
    centre, scale = x_train.mean(0), x_train.std(0) + 1e-2
    probe = LogisticRegression(max_iter=300).fit((x_train - centre) / scale, y_train)
    return 100 * probe.score((x_test - centre) / scale, y_test)


def measure(args):
    """The table of the model card, as Markdown, and the metadata of the weights."""
    net = vit_pocket(0).eval()
    with safe_open(args.weights, "pt") as file:
        net.load_state_dict({k: file.get_tensor(k).float() for k in file.keys()})  # noqa: SIM118 (no mapping)
        metadata = file.metadata()
    torch.manual_seed(0)
    untrained = vit_pocket(0).eval()
    rows = {
        "raw pixels": lambda x: x.reshape(len(x), -1).astype(np.float32) / 255,
        "random ViT": lambda x: features(untrained, x),
        "vit_pocket": lambda x: features(net, x),
    }
    data = shipped_data(args.data)
    lines = ["| nearest class mean / linear probe, % | " + " | ".join(data) + " |", "|---|" + "---|" * len(data)]
    for name, embed in rows.items():
        cells = []
        for x_train, y_train, x_test, y_test in data.values():
            parts = embed(x_train), y_train, embed(x_test), y_test
            cells.append(f"{nearest_class_mean(*parts):.1f} / {linear_probe(*parts):.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines), metadata


LICENCE = (
    "the licence of this project; trained on renderings of Noto (SIL OFL 1.1) and DejaVu (Bitstream Vera / Arev "
    "licence), contains no font data"
)

CARD = """# vit_pocket

A small vision transformer for the pocket suite: 28 x 28 grey images in, 128 features out (the class token after
the final norm).

- **Architecture**: `timm.models.vision_transformer.VisionTransformer({shape})`, {parameters:,} parameters without
  a head, 17 tokens. The file has timm's state-dict names, in float16, without the head.
- **Input**: white ink on black, `(x / 255 - 0.5) / 0.5`.
- **Data**: classification of {letters:,} letters ({drawings:,} drawings in Noto and DejaVu typefaces), rendered
  anew for every batch with random affine and elastic deformation, stroke width, blur, contrast and noise
  (`scripts/glyph_rendering.py`). Not among them: digits, the 100 letters of seq-glyphs, all letters of the eight
  scripts of seq-scripts, and whatever resembles one of these (intersection over union of 0.75 or more over any
  typefaces).
- **Licence**: {licence}.
- **Limits**: it knows isolated bright strokes on a dark ground, nothing of photographs. The shipped benchmarks
  deform letters more than its training did. Raw pixels stand below as the baseline that features have to beat.

## Recipe

{recipe}.

{commands}

## What pretraining buys

{table}

Class means and probes (logistic regression on standardised features) are fitted on the training images of the
shipped data and measured on its test images; digits: scikit-learn's `load_digits`, resized to 28 x 28, 80/20
split. None of these classes was seen in pretraining. The untrained ViT has the same shape and initialisation.
Remake the table with `python scripts/pretrain_vit_pocket.py --eval_only`.
"""


def write_card(args):
    table, metadata = measure(args)
    recipe = json.loads(metadata["recipe"])
    commands, before = [], ""
    for cycle in recipe["cycles"]:
        options = " ".join(f"--{k} {cycle[k]}" for k in ("images", "lr", "batch_size", "seed"))
        commands.append(f"    python scripts/pretrain_vit_pocket.py {options}{before}")
        before = " --continue_from results/vit_pocket_checkpoint.pt"
    text = (
        f"{int(metadata['images_seen']):,} images (one cycle per command below); {recipe['optimizer']}; "
        f"{recipe['schedule']}; label smoothing {recipe['label_smoothing']}; gradients clipped to norm "
        f"{recipe['clip_grad_norm']:g}; {sum(c['minutes'] for c in recipe['cycles']):.0f} minutes on a share of one "
        f"CPU core (torch {recipe['torch']})"
    )
    args.weights.with_suffix(".md").write_text(
        CARD.format(
            shape=", ".join(f"{k}={v}" for k, v in SHAPE.items()),
            table=table,
            licence=metadata["licence"],
            recipe="\n".join(textwrap.wrap(text, 114)),
            parameters=sum(p.numel() for p in vit_pocket(0).parameters()),
            letters=recipe["letters"],
            drawings=recipe["drawings"],
            commands="\n".join(commands),
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font_dirs", nargs="+", default=["/usr/share/fonts"], help="folders searched for the fonts")
    parser.add_argument("--images", type=int, default=250_000, help="images to train on")
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split_seed", type=int, default=0, help="must be the --seed that build_glyphs.py ran with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "results/vit_pocket_checkpoint.pt")
    parser.add_argument("--continue_from", type=Path, help="a checkpoint to start another cosine cycle from")
    parser.add_argument("--weights", type=Path, default=ROOT / "backbones/weights/vit_pocket.safetensors")
    parser.add_argument("--data", type=Path, default=ROOT / "datasets/data/glyphs.npz.xz")
    parser.add_argument("--eval_only", action="store_true", help="only remake the table and the card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.eval_only:
        train(args)
    write_card(args)


if __name__ == "__main__":
    main()
