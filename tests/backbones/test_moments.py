import pytest
import timm
import torch
from torch import nn

from backbones.utils.moments import InputMoments

torch.set_num_threads(1)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_moment_of_captured_inputs(vit, dtype):
    images = torch.randn(6, 3, 32, 32)
    seen = []
    vit.blocks[1].attn.qkv.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    expected_out = vit(images)
    with InputMoments(vit, "attn.qkv", dtype) as moments:
        out = vit(images[:4])
        with torch.no_grad():
            vit(images[4:])
    vit(images)  # outside the block: not counted
    X = torch.cat(seen[1:3]).reshape(-1, 24).double()
    S = moments.sums["blocks.1.attn.qkv"]
    assert list(moments.sums) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"] and S.dtype == dtype
    assert moments.counts["blocks.1.attn.qkv"] == len(X) == 6 * 17
    assert not S.requires_grad
    torch.testing.assert_close(S.double(), X.T @ X, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-4)
    torch.testing.assert_close(moments.means()["blocks.1.attn.qkv"], S / len(X))
    assert torch.equal(out, expected_out[:4]) or torch.allclose(out, expected_out[:4], atol=1e-6)
    assert not vit.blocks[0].attn.qkv._forward_pre_hooks


def test_entering_again_goes_on_and_reset_forgets(vit):
    images = torch.randn(4, 3, 32, 32)
    moments, whole = (InputMoments(vit, ["attn.qkv", "fc1"], torch.float64) for _ in range(2))
    with whole:
        vit(images)
    for part in images.split(2):
        with moments:
            vit(part)
    for name in whole.sums:
        torch.testing.assert_close(moments.sums[name], whole.sums[name], rtol=1e-6, atol=1e-6)
    assert moments.counts == whole.counts
    moments.reset()
    assert not moments.sums and not moments.means()


def test_autocast_and_matmul_precision_do_not_round_the_sums():
    net, x = nn.Sequential(nn.Linear(16, 16)), 1 + 1e-3 * torch.randn(64, 16)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with InputMoments(net, "0") as moments, torch.autocast("cpu", torch.bfloat16):
            net(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(moments.sums["0"].double(), x.double().T @ x.double(), rtol=1e-6, atol=1e-6)


def test_messages_and_cleaning_up_after_errors(vit):
    with pytest.raises(ValueError, match=r"matches target 'qvk'; available: blocks\.\*\.attn\.qkv"):
        InputMoments(vit, "qvk")
    moments = InputMoments(vit, "attn.qkv")
    with pytest.raises(RuntimeError, match="already being collected"), moments, moments:
        pass
    with pytest.raises(ZeroDivisionError), moments:
        1 / 0  # noqa: B018
    assert not vit.blocks[0].attn.qkv._forward_pre_hooks


def test_diagonals_and_moments_behind_a_map():
    """(d,) and r x r sums equal those taken from the inputs, whatever the batches and the shape of x."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    A = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    h = net[0](x).detach()
    flat, hidden = x.reshape(-1, 6).double(), h.reshape(-1, 4).double()
    for split in (1, 2, 3):
        diagonal = InputMoments(net, ["0", "1"], diagonal=True)
        through = InputMoments(net, ["0", "1"], torch.float64, through={"0": A})
        with diagonal, through:
            for part in x.split(split):
                net(part)
        torch.testing.assert_close(diagonal.sums["0"].double(), flat.square().sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(diagonal.sums["1"].double(), hidden.square().sum(0), rtol=1e-5, atol=1e-5)
        z = flat @ A.double().T
        torch.testing.assert_close(through.sums["0"], z.T @ z)
        torch.testing.assert_close(through.sums["1"], hidden.T @ hidden)
        assert diagonal.counts == through.counts == {"0": 15, "1": 15}
