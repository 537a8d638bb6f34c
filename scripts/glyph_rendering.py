"""Letters as images: shared by `build_glyphs.py` (the shipped data) and `pretrain_vit_pocket.py` (the shipped weights).

A letter in one typeface is kept as a *master*: the signed distance to its outline on a 64 x 64 grid. One resampling of
that field gives everything an augmentation wants at once: affine and elastic deformation move the sampling points, a
shift of the threshold makes strokes thicker or thinner, the slope of the threshold blurs. It runs on whole batches in
torch, fast enough (thousands of images a second on one core) to render during training.
"""

import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

SIDE = 28  # side of the images
GRID = 64  # side of a master; 64 grid points span the 28 pixels
UNIT = 8  # masters are int8, in eighths of a grid step
STEPS_PER_PIXEL = GRID / SIDE

FONT_HELP = """Fonts missing: {missing}
The glyphs are rendered from Noto (SIL OFL 1.1) and DejaVu (Bitstream Vera / Arev licence). On Debian or Ubuntu:
    apt-get install fonts-noto-core fonts-dejavu-core fonts-dejavu-extra
Elsewhere, point --font_dirs at folders that hold NotoSans-Regular.ttf and DejaVuSans.ttf with their families."""

# Left out: faces that affine augmentation makes anyway (condensed, bold italics), faces that give a code point another
# letter form (Rashi, Nastaliq, the regional Tifinagh alphabets), and what is not a text face.
SKIPPED_FACES = (
    "Condensed",
    "BoldItalic",
    "BoldOblique",
    "MonoOblique",
    "Mono-Oblique",
    "MathTeXGyre",
    "Display",
    "Rashi",
    "Nastaliq",
    "Traditional",
    "Slanted",
    "Unjoined",
    "Symbols",
    "SansMath",
    "Music",
    "SignWriting",
    "LastResort",
)
# Scripts whose letters are too intricate for 28 pixels (or are pictures), and scripts of shorthand strokes.
SKIPPED_SCRIPTS = {
    "Tangut",
    "Cuneiform",
    "Egyptian_Hieroglyphs",
    "Anatolian_Hieroglyphs",
    "Han",
    "Hangul",
    "Duployan",
    "Common",
    "Inherited",
    "Unknown",
    "Ogham",
}


@dataclass
class Masters:
    """All masters of a set of letters; those of one letter are adjacent."""

    letters: list  # one character per letter, sorted by code point
    owner: np.ndarray  # (n,) the letter that each master belongs to
    fields: np.ndarray  # (n, 64, 64) int8 signed distances, positive inside
    thinnest: np.ndarray  # (n,) half width of the thinner strokes, grid steps
    gap: np.ndarray  # (n,) half width of the narrower gaps between strokes, grid steps
    faces: list  # (n,) file name of the typeface

    def subset(self, chosen):
        """The masters of the letters with the indices in `chosen`, in that order."""
        rows = [np.flatnonzero(self.owner == letter) for letter in chosen]
        owner = np.repeat(np.arange(len(chosen)), [len(r) for r in rows])
        rows = np.concatenate(rows)
        return Masters(
            [self.letters[i] for i in chosen],
            owner,
            self.fields[rows],
            self.thinnest[rows],
            self.gap[rows],
            [self.faces[r] for r in rows],
        )


def script_of(letter):
    """The long name of the script a character belongs to, such as 'Georgian'."""
    from fontTools import unicodedata as ucd

    return ucd.script_name(ucd.script(letter)).replace(" ", "_")


def describe(letter):
    return f"U+{ord(letter):04X} {unicodedata.name(letter)}"


def is_plain_letter(letter):
    """A letter that no other letter is part of: no digit, no accent, no ligature, no compatibility form."""
    return (
        unicodedata.category(letter) in ("Lu", "Ll", "Lo")
        and unicodedata.normalize("NFKD", letter) == letter
        and script_of(letter) not in SKIPPED_SCRIPTS
    )


def find_faces(font_dirs):
    """The usable Noto and DejaVu files below `font_dirs`, sorted by name; exits with code 2 where a family lacks."""
    files = {p.name: p for d in font_dirs for p in sorted(Path(d).rglob("*.ttf"))}
    missing = [
        n
        for n in ("NotoSans-Regular.ttf", "NotoSansGeorgian-Regular.ttf", "DejaVuSans.ttf", "DejaVuSerif.ttf")
        if n not in files
    ]
    if missing:
        print(FONT_HELP.format(missing=", ".join(missing)), file=sys.stderr)
        raise SystemExit(2)

    def wanted(name):
        regional_tifinagh = name.startswith("NotoSansTifinagh") and name != "NotoSansTifinagh-Regular.ttf"
        skipped = regional_tifinagh or any(s in name for s in SKIPPED_FACES)
        return name.startswith(("Noto", "DejaVu")) and not skipped

    return [files[n] for n in sorted(files) if wanted(n)]


def face_record(path):
    """(family and style, version, licence) out of a font file's own name table."""
    from fontTools.ttLib import TTFont

    names = TTFont(path, lazy=True)["name"]
    licence = f"{names.getDebugName(13)} {names.getDebugName(14)} {names.getDebugName(0)}"
    known = [("Open Font License", "OFL-1.1"), ("sil.org/OFL", "OFL-1.1"), ("Bitstream", "Bitstream Vera / Arev")]
    # Hanifi Rohingya's name table has no licence; the package's copyright file puts all Noto fonts under the OFL.
    otherwise = "OFL-1.1 (by the package)" if names.getDebugName(1).startswith("Noto") else "unknown"
    version = names.getDebugName(5).removeprefix("Version ").split(";")[0]
    return names.getDebugName(4), version, next((short for text, short in known if text in licence), otherwise)


def tight_bitmap(font, text, side=96):
    """The ink of `text`, cropped and scaled so that its longer side is `side`; None where there is (next to) no ink."""
    left, top, right, bottom = font.getbbox(text)
    if right - left < 1 or bottom - top < 1:
        return None
    image = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(image).text((4 - left, 4 - top), text, fill=255, font=font)
    box = image.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < 20:
        return None
    image = image.crop(box)
    factor = side / max(image.size)
    return image.resize(
        [max(1, round(s * factor)) for s in image.size],
        Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC,
    )


def distance_field(bitmap):
    """Signed distance on the 64 grid, and the half widths of thin strokes and narrow gaps, all in grid steps."""
    canvas = Image.new("L", (2 * GRID, 2 * GRID))
    canvas.paste(bitmap, ((2 * GRID - bitmap.width) // 2, (2 * GRID - bitmap.height) // 2))
    ink = np.asarray(canvas) > 127
    inside, outside = ndimage.distance_transform_edt(ink), ndimage.distance_transform_edt(~ink)
    ridge = inside[ink & (inside >= ndimage.maximum_filter(inside, 5))]
    # A gap's half width is a local maximum of the distance to the ink; those near the border are no gaps.
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    between = np.zeros_like(ink)
    between[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    valley = outside[between & ~ink & (outside >= ndimage.maximum_filter(outside, 5))]
    thinnest = np.percentile(ridge, 15) / 2
    gap = np.percentile(valley, 10) / 2 if len(valley) else 8.0
    field = np.where(ink, inside - 0.5, 0.5 - outside).reshape(GRID, 2, GRID, 2).mean((1, 3)) / 2
    return np.clip(np.rint(field * UNIT), -127, 127).astype(np.int8), thinnest, gap


def load_masters(font_dirs, accept=is_plain_letter, max_faces=8):
    """Masters of all characters that `accept` admits and some face really draws.

    A code point in the cmap is no proof of a drawing: glyphs without ink, glyphs that equal the face's .notdef, and
    bitmaps that a face uses for three or more code points (placeholder boxes) are rejected."""
    from fontTools.ttLib import TTFont

    found = {}
    verdict = {}
    for path in find_faces(font_dirs):
        with TTFont(path, lazy=True) as file:
            cmap, order = file.getBestCmap(), file.getGlyphOrder()
        font = ImageFont.truetype(str(path), 200, layout_engine=ImageFont.Layout.BASIC)
        missing = tight_bitmap(font, "\U0010fffe")
        drawn = {}
        for code, glyph in sorted(cmap.items()):
            letter = chr(code)
            if code not in verdict:
                verdict[code] = accept(letter)
            if verdict[code] and glyph != order[0]:
                bitmap = tight_bitmap(font, letter)
                if bitmap is not None and (missing is None or bitmap.tobytes() != missing.tobytes()):
                    drawn[letter] = bitmap
        uses = Counter(b.tobytes() for b in drawn.values())
        for letter, bitmap in drawn.items():
            if uses[bitmap.tobytes()] < 3 and len(found.setdefault(letter, [])) < max_faces:
                found[letter].append((bitmap, path.name))
    letters = sorted(found)
    owner = np.repeat(np.arange(len(letters)), [len(found[c]) for c in letters])
    fields, thinnest, gap = zip(*(distance_field(bitmap) for c in letters for bitmap, _ in found[c]), strict=True)
    faces = [face for letter in letters for _, face in found[letter]]
    return Masters(letters, owner, np.stack(fields), np.array(thinnest), np.array(gap), faces)


def stroke_shift(thinnest, gap, wish):
    """How far the outline may move (grid steps) when `wish` in [-1, 1] asks for thinner or thicker strokes.

    Thinner: thin strokes keep 70 % of their width, and at least about 0.8 pixels, or hairlines vanish. Thicker: a
    narrow gap keeps half of its width, or bold letters fill up. A hairline is thickened even against the wish."""
    floor = 0.4 * STEPS_PER_PIXEL
    most = torch.minimum(0.5 * gap, torch.full_like(gap, 2.0))
    least = torch.maximum(-0.3 * thinnest, floor - thinnest).clamp(max=2.0)
    most = torch.maximum(most, least)
    neutral = torch.zeros_like(gap).clamp(min=least)
    return torch.where(wish > 0, neutral + wish * (most - neutral), neutral - wish * (least - neutral))


def render(fields, thinnest, gap, generator, strength=1.0, noise=0.06, paper_noise=0.35):
    """One augmented image per row of `fields` (n, 64, 64): float (n, 28, 28) in [0, 1], white ink on black.

    `strength` scales rotation, shear, stretch and the elastic warp.
    `noise` is the largest standard deviation on full ink, `paper_noise` the share of it that falls on the paper too."""
    n = len(fields)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle = uniform(-0.26, 0.26) * strength
    shear = uniform(-0.2, 0.2) * strength
    stretch, size = uniform(-0.12, 0.12) * strength, uniform(-0.17, 0.12)
    # The matrix maps output points to master points: a small letter needs a large step.
    zx, zy = torch.exp(-size - stretch), torch.exp(-size + stretch)
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([zx * (cos + shear * sin), zx * (-sin + shear * cos), uniform(-0.14, 0.14)], 1)
    row_y = torch.stack([zy * sin, zy * cos, uniform(-0.14, 0.14)], 1)
    points = F.affine_grid(torch.stack([row_x, row_y], 1), [n, 1, SIDE, SIDE], align_corners=False)
    waves = torch.randn(n, 2, 5, 5, generator=generator) * 0.035 * strength
    points = points + F.interpolate(waves, size=(SIDE, SIDE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    field = F.grid_sample(fields[:, None].float() / UNIT, points, padding_mode="border", align_corners=False)[:, 0]
    field = field + stroke_shift(thinnest, gap, uniform(-1, 1))[:, None, None]
    image = (field / (STEPS_PER_PIXEL * uniform(0.8, 1.6, 1, 1)) + 0.5).clamp(0, 1)
    blurred = F.avg_pool2d(F.pad(image[:, None], (1, 1, 1, 1)), 3, stride=1)[:, 0]
    image = torch.lerp(image, blurred, uniform(0, 0.5, 1, 1))
    paper, pen = uniform(-0.06, 0.1, 1, 1).clamp(min=0), uniform(0.65, 1.0, 1, 1)
    image = paper + (pen - paper) * image
    image = image + torch.randn(n, SIDE, SIDE, generator=generator) * uniform(0, noise, 1, 1) * (paper_noise + image)
    return image.clamp(0, 1)


def render_letters(masters, per_letter, generator, strength=1.0, levels=16):
    """uint8 images (letters, per_letter, 28, 28) in `levels` grey levels; the faces of a letter take turns.

    Few grey levels and clean paper keep the shipped file small."""
    images = []
    for letter in range(len(masters.letters)):
        rows = np.resize(np.flatnonzero(masters.owner == letter), per_letter)
        pick = [
            torch.from_numpy(a[rows])
            for a in (masters.fields, masters.thinnest.astype(np.float32), masters.gap.astype(np.float32))
        ]
        image = render(*pick, generator, strength, noise=0.05, paper_noise=0.0)
        images.append((torch.round(image * (levels - 1)) * (255 // (levels - 1))).to(torch.uint8))
    return torch.stack(images).numpy()


def silhouettes(masters, square=False):
    """(n, 784) binary images without deformation, cropped tightly, all with strokes of about the same width, to compare
    shapes by. `square` stretches letters to a square (by a factor of two at most)."""
    fields = torch.from_numpy(masters.fields)
    n = len(fields)
    extent = torch.stack([(fields > 0).any(1).sum(1), (fields > 0).any(2).sum(1)], 1)
    factor = (extent / extent.amax(1, keepdim=True)).clamp(min=0.5) if square else torch.ones(n, 2)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = factor.T
    shift = (
        torch.from_numpy(1.5 * STEPS_PER_PIXEL - masters.thinnest).clamp(min=-1.0, max=1.5 * STEPS_PER_PIXEL).float()
    )
    out = []
    for rows in torch.arange(n).split(4096):
        grid = F.affine_grid(theta[rows], [len(rows), 1, SIDE, SIDE], align_corners=False)
        small = F.grid_sample(fields[rows, None].float() / UNIT, grid, padding_mode="border", align_corners=False)[:, 0]
        out.append((small + shift[rows, None, None] > 0).flatten(1))
    return torch.cat(out).numpy()


def iou(a, b):
    """Intersection over union of every binary row of `a` with every binary row of `b` (0 and 1 as float32)."""
    common = a @ b.T
    return common / np.maximum(a.sum(1)[:, None] + b.sum(1)[None] - common, 1)


def letter_iou(masters, letters_per_block=64):
    """(letters, letters): the largest IoU between any face of one and any face of the other; the diagonal is zero.

    The larger of two IoUs counts, in the letters' own proportions and stretched to a square: a wide and a narrow u are
    alike."""
    starts = np.searchsorted(masters.owner, np.arange(len(masters.letters)))
    ends = [*starts[1:], len(masters.owner)]
    similarity = np.zeros((len(starts), len(starts)), np.float32)
    for square in (False, True):
        shapes = silhouettes(masters, square).astype(np.float32)
        for first in range(0, len(starts), letters_per_block):
            block = starts[first : first + letters_per_block]
            by_face = iou(shapes[block[0] : ends[first + len(block) - 1]], shapes)
            by_letter = np.maximum.reduceat(np.maximum.reduceat(by_face, block - block[0], axis=0), starts, axis=1)
            np.maximum(similarity[first : first + len(block)], by_letter, out=similarity[first : first + len(block)])
    np.fill_diagonal(similarity, 0)
    return similarity


def max_lookalike_iou(images, threshold=0.5):
    """For each of the (classes, height, width) images, such as class means, the IoU with the most similar other one.

    Ink is what exceeds `threshold` of an image's range."""
    flat = np.asarray(images, dtype=np.float32).reshape(len(images), -1)
    low, high = flat.min(1, keepdims=True), flat.max(1, keepdims=True)
    ink = (flat > low + threshold * (high - low)).astype(np.float32)
    similarity = iou(ink, ink)
    np.fill_diagonal(similarity, 0)
    return similarity.max(1)


# The writing systems of seq-scripts. No letter of theirs is in the pretraining or among the held-out letters.
SCRIPT_TASKS = ("Georgian", "Arabic", "Armenian", "Lao", "Tifinagh", "Nko", "Hebrew", "Old_Italic")
DIGITS = "0123456789"
MOST_PRETRAINING = 16  # letters of one script in the pretraining


def letter_or_digit(character):
    return is_plain_letter(character) or character in DIGITS


def is_solid(ink):
    """Whether most of the ink is connected and no mere stroke (an l, dots): too little at 28 pixels to test on."""
    parts, _ = ndimage.label(ink, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    rows, columns = ndimage.find_objects(parts)[sizes.argmax()]
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return sizes.max() > 0.6 * sizes.sum() and min(height, width) >= 0.5 * max(height, width)


def split_letters(masters, seed=0, held_out=100, per_script=10, most_held_out=5, most_pretraining=MOST_PRETRAINING):
    """Indices into `masters.letters`: (glyphs, scripts, pretraining), and the look-alike matrix they were chosen by.

    Letters to evaluate on are drawn at random, and taken if their IoU with all those already taken stays below 0.7 over
    all faces. Pretraining gets what is left, less the scripts of seq-scripts, what resembles an evaluation letter or a
    digit (0.75 or more), and one of two letters that resemble each other (above 0.85). `most_held_out` and
    `most_pretraining` letters at most come from one script, or syllabaries of a thousand signs would be most of it."""
    rng = np.random.default_rng(seed)
    similarity = letter_iou(masters)
    script = np.array([script_of(c) for c in masters.letters])
    digit = np.array([c in DIGITS for c in masters.letters])
    n_faces = np.bincount(masters.owner)
    starts = np.searchsorted(masters.owner, np.arange(len(masters.letters)))
    solid = np.minimum.reduceat([is_solid(field > 0) for field in masters.fields], starts)
    taken = []

    def draw(candidates, count, most=None):
        chosen = []
        for letter in rng.permutation(candidates):
            used = sum(script[other] == script[letter] for other in chosen)
            if len(chosen) < count and (most is None or used < most) and similarity[letter, taken].max(initial=0) < 0.7:
                chosen.append(letter)
                taken.append(letter)
        if len(chosen) < count:
            raise RuntimeError(f"Only {len(chosen)} of {count} letters are left: are all fonts installed?")
        return chosen

    like_digit = similarity[:, digit].max(1) >= 0.75
    usable = solid & ~digit & ~like_digit
    scripts = []
    for name in SCRIPT_TASKS:
        here = usable & (script == name)
        # Several faces make a class more than one drawing; scripts with a single face have to do without.
        several = here & (n_faces > 1)
        scripts += sorted(draw(np.flatnonzero(several if several.sum() >= 2 * per_script else here), per_script))
    glyphs = draw(np.flatnonzero(usable & (n_faces > 1) & ~np.isin(script, SCRIPT_TASKS)), held_out, most_held_out)
    free = ~digit & ~like_digit & ~np.isin(script, SCRIPT_TASKS) & (similarity[:, taken].max(1) < 0.75)
    free[taken] = False
    pretraining = []
    used = Counter()
    for letter in rng.permutation(np.flatnonzero(free)):
        if used[script[letter]] < most_pretraining and similarity[letter, pretraining].max(initial=0) <= 0.85:
            pretraining.append(letter)
            used[script[letter]] += 1
    return np.array(glyphs), np.array(scripts), np.array(sorted(pretraining)), similarity
