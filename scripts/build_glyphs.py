"""Build the data set behind seq-glyphs and seq-scripts from installed fonts.

    python scripts/build_glyphs.py

Writes datasets/data/glyphs.npz.xz, its checksum and its README. The same seed, fonts and library versions give the
same bytes.
"""

import argparse
import hashlib
import io
import lzma
from pathlib import Path

import numpy as np
import PIL
import torch
from glyph_rendering import (
    DIGITS,
    MOST_PRETRAINING,
    SCRIPT_TASKS,
    describe,
    face_record,
    find_faces,
    letter_or_digit,
    load_masters,
    render_letters,
    script_of,
    split_letters,
)
from PIL import Image, features

ROOT = Path(__file__).resolve().parents[1]
README = """# glyphs.npz.xz

Letters of many writing systems as 28 x 28 images, white ink on black: the data of `seq-glyphs` and `seq-scripts`.
No download, no people in it. Read it with `numpy.load(io.BytesIO(lzma.open(path).read()), allow_pickle=False)`;
`sha256sum -c glyphs.sha256` checks it.

| array | shape | content |
|---|---|---|
{arrays}

- **seq-glyphs**: {n_glyphs} letters, 10 tasks of 10 in label order. The order is random, so that a task mixes
  scripts.
- **seq-scripts**: {n_tasks} tasks of 10, each task one writing system: {tasks}. `scripts_task[c]` is the task of
  class c.
- {train} training and {test} test images per class: different draws from one distribution. All faces of a letter
  take turns in both.
- `pretraining_codepoints`: the {n_pretraining} letters that `vit_pocket` was pretrained on. No letter of
  seq-glyphs, no script of seq-scripts and no digit is among them.

## How it was built

    python scripts/build_glyphs.py{options}

with {versions}. The sampling is seeded; other versions of FreeType, torch or the fonts may change single grey
levels.

1. **Letters**: Unicode letters (Lu, Ll, Lo) that are their own NFKD form: no digits, accented letters, ligatures,
   compatibility forms. Scripts too intricate for 28 pixels (Tangut, cuneiform, hieroglyphs) and shorthand are
   left out. A glyph counts if the font's cmap has it and its bitmap has ink, differs from the font's .notdef and
   is not shared by three code points of the face (placeholder boxes). {n_letters} letters in {n_masters} drawings
   remain.
2. **Look-alikes**: all drawings of all letters are cropped tightly, drawn with strokes of equal width, and
   compared by intersection over union (IoU), in their own proportions and stretched to a square; the largest
   value over all pairs of faces and both crops counts. A case pair such as s and S is thus one shape. Letters for
   evaluation are drawn at random and kept if their IoU with all others kept is below 0.7; mere strokes and dots
   are passed over. Letters with several faces are preferred. Pretraining letters with an IoU of 0.75 or more with
   an evaluation letter or a digit are dropped, likewise one of two above 0.85 among themselves, and beyond {most}
   of one script (drawn at random). `glyphs_max_iou` and `scripts_max_iou` hold, for each class, the largest IoU
   with any other evaluation or pretraining letter: at most {worst:.3f}. `max_lookalike_iou` in
   `scripts/glyph_rendering.py` measures it on images.
3. **Images**: a signed distance field of each drawing, sampled with random rotation, shear, stretch and elastic
   warp (`--strength {strength:g}`: rotation up to {degrees:.0f} degrees), scale and shift; random stroke width,
   blur, contrast, noise on the ink; 16 grey levels. Strokes are not thinned below 0.8 pixels nor thickened by
   more than half of the narrower gaps, so that hairlines stay and bold letters do not fill up. The strength is
   above the 1 of pretraining on purpose: at 1 the nearest class mean on pretrained features is right in 99 % of
   cases, which leaves nothing to tell methods apart by. Contact sheets (`--contact_sheet FILE.png`: a row per
   class, 12 images) were looked at for letters that vanish, fill up or leave the frame.

## Fonts

Only renderings are distributed, no font data. Both licences allow this.

| face | version | licence |
|---|---|---|
{fonts}

Debian packages: fonts-noto-core, fonts-dejavu-core, fonts-dejavu-extra. Left out are condensed, bold italic and
display faces, Rashi Hebrew, Nastaliq and the regional Tifinagh alphabets (other letter forms under the same code
points), Liberation (version 1 is not under the OFL), FreeFont and STIX.

## Classes of seq-glyphs

| label | letter | script | faces | max IoU |
|---|---|---|---|---|
{glyphs}

## Classes of seq-scripts

| label | task | letter | script | faces | max IoU |
|---|---|---|---|---|---|
{scripts}
"""


def pretty(script):
    return "N'Ko" if script == "Nko" else script.replace("_", " ")


def suite(masters, chosen, args, generator):
    images = render_letters(masters.subset(chosen), args.train + args.test, generator, args.strength)
    n = len(chosen)
    labels = np.arange(n, dtype=np.int64)
    return {
        "x_train": images[:, : args.train].reshape(-1, 28, 28),
        "y_train": labels.repeat(args.train),
        "x_test": images[:, args.train :].reshape(-1, 28, 28),
        "y_test": labels.repeat(args.test),
        "names": np.array([describe(masters.letters[i]) for i in chosen]),
    }


def build(args):
    masters = load_masters(args.font_dirs, letter_or_digit)
    glyphs, scripts, pretraining, similarity = split_letters(masters, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    arrays = {}
    everything = np.concatenate([glyphs, scripts, pretraining])
    for name, chosen in (("glyphs", glyphs), ("scripts", scripts)):
        arrays |= {f"{name}_{k}": v for k, v in suite(masters, chosen, args, generator).items()}
        arrays[f"{name}_max_iou"] = similarity[np.ix_(chosen, everything)].max(1)
    arrays["scripts_task"] = np.arange(len(scripts), dtype=np.int64) // (len(scripts) // len(SCRIPT_TASKS))
    arrays["scripts_task_names"] = np.array([pretty(s) for s in SCRIPT_TASKS])
    arrays["pretraining_codepoints"] = np.array([ord(masters.letters[i]) for i in pretraining], dtype=np.int64)
    return masters, glyphs, scripts, arrays


def write_readme(path, args, masters, glyphs, scripts, arrays):
    n_faces = np.bincount(masters.owner)
    used = {f for i in (*glyphs, *scripts) for f in np.array(masters.faces)[masters.owner == i]}
    records = sorted({face_record(p) for p in find_faces(args.font_dirs) if p.name in used})
    if any(licence == "unknown" for *_, licence in records):
        raise SystemExit(f"A face has no licence known to be open: {[r for r in records if r[2] == 'unknown']}")
    shapes = [f"| `{k}` | {v.shape} | {v.dtype} |" for k, v in arrays.items()]

    def row(suite_name, label, letter, *task):
        character = masters.letters[letter]
        cells = [
            label,
            *task,
            f"{character} {arrays[f'{suite_name}_names'][label]}",
            pretty(script_of(character)),
            n_faces[letter],
            f"{arrays[f'{suite_name}_max_iou'][label]:.2f}",
        ]
        return "| " + " | ".join(map(str, cells)) + " |"

    path.write_text(
        README.format(
            arrays="\n".join(shapes),
            n_glyphs=len(glyphs),
            n_tasks=len(SCRIPT_TASKS),
            tasks=", ".join(map(pretty, SCRIPT_TASKS)),
            train=args.train,
            test=args.test,
            n_pretraining=len(arrays["pretraining_codepoints"]),
            options=f" --train {args.train} --test {args.test} --seed {args.seed} --strength {args.strength:g}",
            strength=args.strength,
            degrees=15 * args.strength,
            versions=f"numpy {np.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}, "
            f"FreeType {features.version('freetype2')}",
            n_letters=len(masters.letters) - len(DIGITS),
            n_masters=sum(masters.letters[i] not in DIGITS for i in masters.owner),
            most=MOST_PRETRAINING,
            worst=max(arrays["glyphs_max_iou"].max(), arrays["scripts_max_iou"].max()),
            fonts="\n".join(f"| {face} | {version} | {licence} |" for face, version, licence in records),
            glyphs="\n".join(row("glyphs", label, letter) for label, letter in enumerate(glyphs)),
            scripts="\n".join(
                row("scripts", label, letter, arrays["scripts_task"][label]) for label, letter in enumerate(scripts)
            ),
        )
    )


def contact_sheet(path, arrays, per_class=12):
    """A PNG with `per_class` test images of every class in a row, ten classes below each other."""
    rows = []
    for name in ("glyphs", "scripts"):
        images, labels = arrays[f"{name}_x_test"], arrays[f"{name}_y_test"]
        rows += [np.hstack(images[labels == c][:per_class]) for c in range(labels.max() + 1)]
    columns = [np.vstack(rows[i : i + 60]) for i in range(0, len(rows), 60)]
    Image.fromarray(np.hstack(columns)).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font_dirs", nargs="+", default=["/usr/share/fonts"], help="folders searched for the fonts")
    parser.add_argument("--out", type=Path, default=ROOT / "datasets/data", help="folder to write to")
    parser.add_argument("--train", type=int, default=120, help="training images per class")
    parser.add_argument("--test", type=int, default=30, help="test images per class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=2.0, help="of the deformations; pretraining has 1")
    parser.add_argument("--contact_sheet", type=Path, help="also write a PNG to look at")
    args = parser.parse_args()
    masters, glyphs, scripts, arrays = build(args)
    args.out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    packed = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    (args.out / "glyphs.npz.xz").write_bytes(packed)
    (args.out / "glyphs.sha256").write_text(f"{hashlib.sha256(packed).hexdigest()}  glyphs.npz.xz\n")
    write_readme(args.out / "README.md", args, masters, glyphs, scripts, arrays)
    if args.contact_sheet:
        contact_sheet(args.contact_sheet, arrays)
    print(f"{len(glyphs)} + {len(scripts)} classes, {args.train} + {args.test} images each, {len(packed) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
