import copy

import pytest
import timm
import torch
from torch import nn

from backbones.utils.lora import LoRA

torch.set_num_threads(1)
D = 12


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(lora, seed=2):
    lora.reset(A="gaussian", B="gaussian", generator=gen(seed))
    return lora


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5
    ).eval()


@pytest.mark.parametrize(
    "targets, share, alpha",
    [
        (["attn.qkv:q,v"], False, None),
        (["attn.qkv:k,v"], True, 8),
        (["attn.qkv", "mlp.fc1"], False, 3),
        (["blocks.1.attn.qkv:q,v", "mlp.fc2", "head"], False, 1),
    ],
)
def test_peft_reads_what_we_write(vit, tmp_path, targets, share, alpha):
    peft = pytest.importorskip("peft")
    bare = copy.deepcopy(vit)
    lora = randomise(LoRA(vit, targets, r=2, alpha=alpha, share_A=share))
    images = torch.randn(3, 3, 32, 32, generator=gen(4))
    lora.export_peft(tmp_path, "vit")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path)).eval()(images)
        torch.testing.assert_close(theirs, vit(images), rtol=1e-5, atol=1e-5)
        assert (theirs - bare(images)).abs().max() > 1e-2
        again = LoRA(copy.deepcopy(bare), targets, r=2, alpha=alpha, share_A=share)
        again.load_peft(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters(), strict=True))
        LoRA.from_peft(whole := copy.deepcopy(bare), tmp_path)
        torch.testing.assert_close(whole(images), vit(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_what_peft_writes(vit, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    bare = copy.deepcopy(vit)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["qkv", "fc1"],
        rank_pattern={"blocks.1.mlp.fc1": 2},
        alpha_pattern={"qkv": 7},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(vit, config).eval()
    theirs.save_pretrained(str(tmp_path))
    images = torch.randn(3, 3, 32, 32, generator=gen(4))
    lora = LoRA.from_peft(bare, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(bare(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert len(lora.layer_names) == 6
    with pytest.raises(ValueError, match="outside the slices"):
        LoRA(bare, ["qkv:k", "fc1"], {n: 2 if n == "blocks.1.mlp.fc1" else 3 for n in lora.layer_names}).load_peft(
            tmp_path
        )
    with pytest.raises(ValueError, match="differ in their layers"):
        LoRA(bare, "qkv", 3).load_peft(tmp_path)
    with pytest.raises(ValueError, match="rank here is 4"):
        LoRA(bare, ["qkv", "fc1"], 4).load_peft(tmp_path)


def test_peft_tells_apart_names_that_end_alike(tmp_path):
    peft = pytest.importorskip("peft")

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.deep = nn.Linear(D, D), nn.ModuleDict({"fc": nn.Linear(D, D)})

        def forward(self, x):
            return self.deep["fc"](self.fc(x).tanh())

    net, x = Nested(), torch.randn(3, D)
    bare = copy.deepcopy(net)
    lora = randomise(LoRA(net, "fc", r={"fc": 2, "deep.fc": 3}, alpha=6))
    lora.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path))
    torch.testing.assert_close(theirs(x), net(x), rtol=1e-5, atol=1e-5)
    LoRA.from_peft(bare, tmp_path)
    torch.testing.assert_close(bare(x), net(x), rtol=1e-5, atol=1e-5)
