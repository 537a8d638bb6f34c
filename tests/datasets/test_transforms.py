from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from datasets.utils.transforms import (
    BICUBIC,
    BILINEAR,
    CenterCrop,
    ColorJitter,
    Compose,
    Denormalize,
    Draws,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int = 6, size: tuple[int, int] = (32, 32), seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 3, *size, generator=gen(seed))


RANDOM = [
    RandomCrop(28, padding=4),
    RandomHorizontalFlip(),
    RandomResizedCrop(40),
    RandomResizedCrop((12, 20), interpolation=BICUBIC),
    RandomAffine(30, (0.2, 0.1), (0.7, 1.3)),
]


@pytest.mark.parametrize("t", RANDOM, ids=repr)
def test_each_image_has_its_own_draw_and_the_seed_decides(t):
    same = images(1).repeat(32, 1, 1, 1)
    out = t(same, gen(3))
    assert len({tuple(o.flatten().tolist()) for o in out}) > 1
    assert torch.equal(out, t(same, gen(3)))
    assert not torch.equal(out, t(same, gen(4)))
    torch.manual_seed(3)  # no generator: the global one
    assert torch.equal(out, t(same))


@pytest.mark.parametrize("t", [*RANDOM, Resize(20), CenterCrop(24)], ids=repr)
def test_single_images_dtypes_and_inputs_are_kept(t):
    x = images()
    before = x.clone()
    assert torch.equal(t(x[0], gen(1)), t(x[:1], gen(1))[0])
    assert t(x.double(), gen(1)).dtype == torch.float64
    raw = (x * 255).round().to(torch.uint8)
    out = t(raw, gen(1))
    assert out.dtype == torch.uint8
    clipped = (t(raw.float(), gen(1))).clamp(0, 255)
    assert (out.float() - clipped).abs().max() <= 1  # the same boxes, up to rounding
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="takes"):
        t(x[0, 0])


def test_random_crop_is_a_slice_of_the_padded_image():
    x, size, pad = images(20), 28, 4
    out = RandomCrop(size, pad)(x, gen(5))
    g = gen(5)
    top = torch.randint(32 + 2 * pad - size + 1, (20, 1), generator=g)
    left = torch.randint(32 + 2 * pad - size + 1, (20, 1), generator=g)
    padded = torch.zeros(20, 3, 40, 40)
    padded[:, :, pad:-pad, pad:-pad] = x
    for i in range(20):
        a, b = int(top[i]), int(left[i])
        assert torch.equal(out[i], padded[i, :, a : a + size, b : b + size])
    assert int(top.min()) == 0 or int(top.max()) == 12 or top.unique().numel() > 3
    with pytest.raises(ValueError, match="does not fit"):
        RandomCrop(50)(x)


def test_random_crop_reaches_every_offset_equally():
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(9000, 1, 1, 1)
    corner = RandomCrop(2)(x, gen())[:, 0, 0, 0].long()
    counts = torch.bincount(corner, minlength=16).view(4, 4)[:3, :3].flatten().double()
    assert counts.sum() == 9000
    assert ((counts - 1000).abs() < 5 * (9000 * (1 / 9) * (8 / 9)) ** 0.5).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip_frequency(p):
    x = torch.arange(4.0).view(1, 1, 2, 2).repeat(10_000, 1, 1, 1)
    out = RandomHorizontalFlip(p)(x, gen())
    flipped = out[:, 0, 0, 0] == 1
    assert torch.equal(out[flipped], x[flipped].flip(-1)) and torch.equal(out[~flipped], x[~flipped])
    assert abs(flipped.double().mean() - p) <= 5 * (p * (1 - p) / 10_000) ** 0.5


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size,out", [((32, 32), (224, 224)), ((64, 48), (16, 20)), ((40, 40), (28, 28))])
def test_random_resized_crop_equals_torchvision_on_the_same_boxes(interpolation, size, out):
    t, x = RandomResizedCrop(out, (0.05, 1.0), interpolation=interpolation), images(24, size)
    boxes = t.boxes(24, *size, gen(2))
    got = t(x, gen(2))
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        want = TF.resized_crop(x[i], top, left, h, w, list(out), interpolation, antialias=True)
        assert torch.allclose(got[i], want, atol=2e-5), (i, (got[i] - want).abs().max())
    assert len(boxes.unique(dim=0)) > 15


def test_boxes_follow_scale_and_ratio_and_fall_back_to_the_centre():
    t = RandomResizedCrop(224, (0.2, 0.6), (0.5, 2.0))
    top, left, h, w = t.boxes(4000, 200, 300, gen()).T
    area = (h * w) / (200 * 300)
    assert area.min() > 0.19 and area.max() < 0.61 and abs(area.mean() - 0.4) < 0.02
    assert (h / w).min() > 0.48 and (h / w).max() < 2.05
    assert top.min() == 0 and (top + h).max() == 200 and left.min() == 0 and (left + w).max() == 300
    # quarter boxes of a 4 x 4 image start at 0, 1 or 2, each as often
    places = RandomResizedCrop(8, (0.25, 0.25), (1.0, 1.0)).boxes(9000, 4, 4, gen())
    assert (places[:, 2:] == 2).all()
    for column in (0, 1):
        assert (torch.bincount(places[:, column], minlength=3) - 3000).abs().max() < 5 * (9000 * 2 / 9) ** 0.5
    # a ratio that the image cannot hold at full area: torchvision's central crop
    impossible = RandomResizedCrop(8, (1.0, 1.0), (2.0, 2.0))
    assert impossible.boxes(3, 10, 10, gen()).tolist() == [[2, 0, 5, 10]] * 3
    with pytest.raises(ValueError):
        RandomResizedCrop(8, interpolation=InterpolationMode.NEAREST)


def test_resize_and_centre_crop_are_torchvisions():
    x = images(3, (30, 40))
    assert torch.equal(Resize(15, BICUBIC)(x), TF.resize(x, [15], BICUBIC, antialias=True))
    assert Resize(15)(x).shape[-2:] == (15, 20) and Resize((7, 9))(x).shape[-2:] == (7, 9)
    assert torch.equal(CenterCrop(20)(x), x[:, :, 5:25, 10:30])


def test_normalise_and_denormalise_are_inverse():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = images()
    y = Normalize(mean, std)(x)
    assert torch.allclose(y[:, 1], (x[:, 1] - 0.4) / 0.3)
    assert torch.allclose(Denormalize(mean, std)(y), x, atol=1e-6)
    raw = (x * 255).to(torch.uint8)
    assert torch.allclose(Normalize(mean, std)(raw), Normalize(mean, std)(raw.float() / 255))


def test_affine_without_range_is_the_identity_and_turns_the_right_way():
    x = images(4, (20, 30))
    assert torch.allclose(RandomAffine(0)(x, gen()), x, atol=1e-5)
    t, g = RandomAffine(90), gen(1)
    angles = (2 * torch.rand(4, 4, generator=gen(1))[:, 0] - 1) * 90
    out = t(x, g)
    for i in range(4):  # torchvision measures angles counter-clockwise for rotate
        want = TF.rotate(x[i], -float(angles[i]), InterpolationMode.BILINEAR)
        assert (out[i] - want)[:, 6:14, 10:20].abs().max() < 1e-3
    bigger = RandomAffine(0, scale=(2.0, 2.0))(torch.ones(1, 1, 8, 8) * 0.5)
    assert torch.allclose(bigger, torch.full((1, 1, 8, 8), 0.5))


def test_compose_passes_the_generator_and_takes_foreign_transforms_and_pil():
    c = Compose([RandomHorizontalFlip(), lambda x: x * 2, Compose([RandomCrop(30)])])
    assert len(c.transforms) == 3
    x = images(16)
    assert torch.equal(c(x, gen(1)), c(x, gen(1)))
    assert not torch.equal(c(x, gen(1)), c(x, gen(2)))
    raw = (x[0] * 255).to(torch.uint8)
    pil = Image.fromarray(raw.permute(1, 2, 0).numpy())
    assert torch.equal(Compose([])(pil), raw.float() / 255)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("t", RANDOM, ids=repr)
def test_draws_do_not_depend_on_the_device(t):
    x = images(16)
    assert torch.allclose(t(x.cuda(), gen(1)).cpu(), t(x, gen(1)), atol=1e-3)


def test_colour_jitter_is_torchvisions():
    x = images(6, (5, 7))
    x[0, :, 0] = x[0, :1, 0]  # grey pixels have no hue
    x[1] = 0
    drawn = torch.tensor([[1, 1, 1, -0.5], [1, 1, 1, 0.3], *[[0.8, 1.2, 0.9, 0.1]] * 2, *[[1.3, 0.5, 1.6, -0.2]] * 2])
    got = ColorJitter.jitter(x, drawn)
    for image, (b, c, s, h), y in zip(x, drawn.tolist(), got):
        want = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(image, b), c), s)
        torch.testing.assert_close(y, TF.adjust_hue(want, h), atol=1e-5, rtol=0)


def test_colour_jitter_draws_for_each_image():
    jitter, x = ColorJitter(0.2, 0.2, 0.2, 0.1), images(1, (4, 4)).expand(8, -1, -1, -1)
    y = jitter(x, gen(1))
    assert len({image.numpy().tobytes() for image in y}) == 8 and y.min() >= 0 and y.max() <= 1
    assert torch.equal(y, jitter(x, gen(1)))
    torch.testing.assert_close(ColorJitter()(x), x)
    apart = [jitter(x[:4], gen(k)) for k in (5, 6)]
    assert torch.equal(jitter(x, Draws([(gen(k), 4) for k in (5, 6)])), torch.cat(apart))
    assert jitter((x * 255).round().to(torch.uint8), gen(1)).dtype == torch.uint8
