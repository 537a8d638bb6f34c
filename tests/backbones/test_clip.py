"""CLIP through transformers: parity with the library's own model, the text head, and a run of TAK on it."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import backbones.clip as clip_module
from backbones import get_backbone
from models.task_arithmetic import group_of
from models.utils.kfac import Layout, curvature
from models.utils.linearize import Linearized
from tests.helpers import only_folder, rows, run
from utils.errors import UserError

PROMPTS = [["a photo of a cat.", "a drawing of a cat."], ["a photo of a dog."], ["a blurry dog!", "dogs", "one dog"]]


class Data:
    N_CLASSES, SIZE, CHANNELS = 3, (32, 32), 3


class Named(Data):
    def prompts(self):
        return PROMPTS


@pytest.fixture
def folder(tmp_path):
    """A small random CLIP as transformers saves it, with a tokenizer that spells."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    where = tmp_path / "clip"
    CLIPModel(clip_module._config("tiny")).save_pretrained(where)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters)]
    words += [f"<unused{i}>" for i in range(598 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    (where / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (where / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(str(where)).save_pretrained(where)
    return where


def test_features_are_the_librarys(folder):
    from transformers import CLIPModel

    net = get_backbone(Namespace(backbone="clip", clip_backbone=str(folder)), Data()).eval()
    theirs, x = CLIPModel.from_pretrained(folder).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        want = theirs.get_image_features(pixel_values=x)
        want = getattr(want, "pooler_output", want)
        torch.testing.assert_close(net(x, returnt="features"), want)
        grey = torch.randn(2, 1, 28, 28)
        assert net(grey).shape == (2, 3)  # other sizes and grey images are made to fit
    assert theirs.config.vision_config.hidden_act == "quick_gelu" and net.text_rows is None
    assert float(net.logit_scale) == pytest.approx(float(theirs.logit_scale.detach()))


def test_text_head_is_the_mean_over_templates(folder):
    from transformers import CLIPModel, CLIPTokenizer

    net = get_backbone(Namespace(backbone="clip", clip_backbone=str(folder)), Named())
    model, tokenizer, want = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(str(folder)), []
    with torch.no_grad():
        for of_class in PROMPTS:
            said = []
            for prompt in of_class:  # one by one, without padding
                e = model.get_text_features(**tokenizer([prompt], return_tensors="pt"))
                said.append(F.normalize(getattr(e, "pooler_output", e), dim=1))
            want.append(F.normalize(torch.cat(said).mean(0), dim=0))
    torch.testing.assert_close(net.text_rows, torch.stack(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        get_backbone(Namespace(backbone="clip", clip_backbone=str(folder)), Data()).rows_of(Named()), net.text_rows
    )
    assert net.rows_of(Data()) is None
    assert get_backbone(Namespace(backbone="clip", clip_backbone="tiny"), Data()).rows_of(Named()) is None
    assert not any(n.startswith("text") for n, _ in net.named_parameters())
    assert not any("text" in n for n in net.state_dict())


def test_groups_and_curvature():
    torch.manual_seed(0)
    net = get_backbone(Namespace(backbone="clip", clip_backbone="tiny"), Data()).double()
    modules = dict(net.named_modules())
    groups = {n: group_of(n, modules[n.rpartition(".")[0]]) for n, _ in net.named_parameters() if "classifier" not in n}
    assert set(groups.values()) == {"attention", "linears", "proj", "ln", "class_embed", "conv", "pos_embed"}
    names = [n for n, g in groups.items() if g not in ("conv", "pos_embed")]
    lin = Linearized(net, names, lambda x: F.normalize(net(x, returnt="features"), dim=1))
    layout = Layout.of(net, names)
    joint = [b for b in layout.blocks if len(b.layers) == 3]
    assert len(joint) == 2 and {m.rpartition(".")[2] for m in joint[0].layers} == {"q_proj", "k_proj", "v_proj"}
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    factors = curvature(net, layout, lin.function, [x], draws=0)
    name = "vision_model.embeddings.class_embedding"
    tau = {n: torch.randn_like(p) if n == name else torch.zeros_like(p) for n, p in lin.start().items()}
    drift = lin.expansion(x, [tau])[1][0].square().sum()
    torch.testing.assert_close(tau[name] @ factors.F[name] @ tau[name], drift)
    with torch.no_grad():
        e = net.eval()(x, returnt="features")
    size = e.square().sum(1)
    assert float(factors.B["visual_projection"][0].trace()) == pytest.approx(float((23 / size).sum()))


def test_tak_on_clip(tmp_path):
    argv = "--model=tak --dataset=seq-digits --backbone=clip --clip_backbone=tiny --debug_mode=1 --n_epochs=1"
    argv += " --batch_size=16 --kfac_examples=8 --device=cpu --alpha_grid 0 1 0.5"
    assert run(argv.split(), tmp_path) == 0
    assert float(rows(only_folder(tmp_path) / "summary.csv")[0]["absolute_acc"]) > 0


def test_published_sizes():
    for name, shape in (("ViT-B/32", (768, 32, 12)), ("ViT-B/16", (768, 16, 12)), ("ViT-L/14", (1024, 14, 24))):
        c = clip_module._config(name)
        v = c.vision_config
        assert (v.hidden_size, v.patch_size, v.num_hidden_layers) == shape and v.image_size == 224
        assert c.projection_dim == (768 if "L" in name else 512) and v.layer_norm_eps == 1e-5


def test_mistakes(monkeypatch, tmp_path):
    monkeypatch.setattr(clip_module, "offline", lambda: True)

    def make(**given):
        return get_backbone(Namespace(backbone="clip", **given), Data())

    with pytest.raises(UserError, match="'ViT-B/99'|cannot load CLIP from 'ViT-B/99'"):
        make(clip_backbone="ViT-B/99")
    with pytest.raises(UserError, match="neither a folder nor a name on the hub"):
        make(clip_backbone="nonsense")
    with pytest.raises(UserError, match="cannot load CLIP from 'openai/clip-vit-base-patch32'.*--clip_backbone FOLDER"):
        make(clip_backbone="ViT-B/32")
    with pytest.raises(UserError, match="cannot load CLIP from"):
        make(clip_backbone=str(tmp_path))
    with pytest.raises(UserError, match="--pretrained 0: choose one of"):
        make(clip_backbone=str(tmp_path), pretrained=0)
