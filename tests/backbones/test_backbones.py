"""Backbones: the registry, Mammoth's interface, and that the transformers are timm's own."""

import argparse
import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import backbones
from backbones import get_backbone, get_backbone_names
from backbones import vit as vit_module
from backbones.utils.base import Backbone
from utils.errors import UserError

GREY = SimpleNamespace(N_CLASSES=10, SIZE=(28, 28), CHANNELS=1)
COLOUR = SimpleNamespace(N_CLASSES=10, SIZE=(32, 32), CHANNELS=3)
TINY = "vit_tiny_patch16_224"
NAMES = ["mnistmlp", "resnet18", "vit-pocket"]


def build(name, dataset=GREY, **flags):
    torch.manual_seed(0)
    return get_backbone(argparse.Namespace(backbone=name, **{"pretrained": 0, **flags}), dataset).eval()


@pytest.fixture(scope="module")
def tiny():
    return build("vit", COLOUR, vit_name=TINY)


def test_registry():
    assert set(get_backbone_names()) >= {"vit", *NAMES}
    assert type(build("vit_pocket")) is type(build("vit-pocket"))
    with pytest.raises(UserError, match="unknown backbone 'vit-pockt': did you mean 'vit-pocket'"):
        build("vit-pockt")
    flags = backbones.get_backbone_parser("vit").parse_args([])
    assert (flags.vit_name, flags.pretrained, flags.backbone_weights) == (vit_module.DEFAULT_VIT, 1, None)
    assert vars(backbones.get_backbone_parser("resnet18").parse_args([])) == {}


def test_listing_imports_nothing_heavy():
    code = "import sys, backbones; backbones.get_backbone_names(); assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_alias_of_mammoth():
    from backbone import MammothBackbone, num_flat_features, xavier
    from backbone import get_backbone as same

    assert MammothBackbone is Backbone and same is get_backbone
    assert num_flat_features(torch.zeros(5, 2, 3)) == 6
    layer = torch.nn.Linear(4, 4)
    xavier(layer)
    assert not layer.bias.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dataset", [GREY, COLOUR])
def test_forward(name, dataset):
    net = build(name, dataset)
    x = torch.rand(3, dataset.CHANNELS, *dataset.SIZE)
    out, features = net(x, returnt="both")
    assert out.shape == (3, 10) and features.shape == (3, net.feature_dim) and net.num_classes == 10
    assert torch.equal(net(x), out) and torch.equal(net(x, "features"), features)
    assert torch.equal(net.features(x), features) and torch.equal(net.classifier(features), out)
    assert all(torch.equal(a, b) for a, b in zip(net(x, "all"), (out, features)))
    with pytest.raises(NotImplementedError, match="'logits'"):
        net(x, returnt="logits")


@pytest.mark.parametrize("name, count", zip(NAMES, (89_610, 11_173_962, 802_048 + 1290)))
def test_parameter_counts(name, count):
    net = build(name)
    assert net.get_params().numel() == count
    head, body = net.head_parameters(), net.body_parameters()
    assert list(head) == ["classifier.weight", "classifier.bias"]
    assert [*body, *head] == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_flat_vectors(name):
    net, other = build(name), build(name)
    new = torch.randn_like(net.get_params())
    other.set_params(new)
    net.set_params(new)
    assert torch.equal(net.get_params(), new)
    with torch.no_grad():
        net.classifier.bias.add_(1)
    assert torch.equal(other.get_params(), new)  # nothing is shared
    assert not net.get_grads().any()
    net.get_params().pow(2).sum().backward()
    assert torch.equal(net.get_grads(), 2 * net.get_params())
    net.set_grads(new)
    assert torch.equal(net.get_grads(), new) and len(net.get_grads_list()) == len(list(net.parameters()))
    with pytest.raises(ValueError, match="parameters"):
        net.set_params(new[1:])


@pytest.mark.parametrize("name", NAMES)
def test_copies_seeds_and_heads(name):
    net, x = build(name), torch.rand(2, 1, 28, 28)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), build(name)):
        assert torch.equal(twin(x), net(x)) and isinstance(twin, Backbone)
    net.reset_classifier(7)
    assert net(x).shape == (2, 7) and net.num_classes == net.classifier.out_features == 7


def test_vit_is_timms(tiny):
    model = timm.create_model(TINY, pretrained=False, num_classes=0)
    own = [k for k in tiny.state_dict() if not k.startswith("classifier.")]
    assert own == list(model.state_dict())
    assert isinstance(tiny.get_submodule("blocks.0.attn.qkv"), torch.nn.Linear)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "bin"])
def test_weights_from_a_file(tmp_path, ending, tiny):
    model = timm.create_model(TINY, pretrained=False, num_classes=21).eval()
    file = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save({"state_dict": model.state_dict()} if ending == "pth" else model.state_dict(), file)
    net = build("vit", COLOUR, vit_name=TINY, pretrained=1, backbone_weights=str(file))
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(net.features(x), expected)
        assert torch.equal(net(x), net.classifier(expected)) and net(x).shape == (2, 10)
        assert net(torch.rand(1, 1, 32, 32)).shape == (1, 10)  # grey and small: repeated and resized
    twin = copy.deepcopy(net)
    assert twin.state_dict().keys() == net.state_dict().keys()


def _as_npz(net):
    """The tensors under the names and in the layouts of the original JAX release."""
    jax = {"cls": net.cls_token, "Transformer/posembed_input/pos_embedding": net.pos_embed}

    def put(name, layer, kernel=None):
        jax[f"{name}/{'scale' if kernel is None else 'kernel'}"] = layer.weight if kernel is None else kernel
        jax[f"{name}/bias"] = layer.bias

    put("embedding", net.patch_embed.proj, net.patch_embed.proj.weight.permute(2, 3, 1, 0))
    put("Transformer/encoder_norm", net.norm)
    for i, block in enumerate(net.blocks):
        at = f"Transformer/encoderblock_{i}"
        put(f"{at}/LayerNorm_0", block.norm1)
        put(f"{at}/LayerNorm_2", block.norm2)
        put(f"{at}/MlpBlock_3/Dense_0", block.mlp.fc1, block.mlp.fc1.weight.T)
        put(f"{at}/MlpBlock_3/Dense_1", block.mlp.fc2, block.mlp.fc2.weight.T)
        heads, dim = block.attn.num_heads, net.embed_dim
        w, b = block.attn.qkv.weight.view(3, heads, -1, dim), block.attn.qkv.bias.view(3, heads, -1)
        for k, name in enumerate(("query", "key", "value")):
            at_name = f"{at}/MultiHeadDotProductAttention_1/{name}"
            jax[f"{at_name}/kernel"], jax[f"{at_name}/bias"] = w[k].permute(2, 0, 1), b[k]
        out = block.attn.proj
        put(f"{at}/MultiHeadDotProductAttention_1/out", out, out.weight.T.reshape(heads, -1, dim))
    return {k: v.detach().numpy() for k, v in jax.items()}


@pytest.mark.parametrize("second_norm", ["LayerNorm_2", "LayerNorm_1"])
def test_original_npz(tmp_path, second_norm):
    source = build("vit-pocket")
    torch.nn.init.normal_(source.blocks[1].attn.qkv.bias)
    tensors = {k.replace("LayerNorm_2", second_norm): v for k, v in _as_npz(source).items()}
    np.savez(tmp_path / "vit.npz", **tensors)
    flags = {"backbone_weights": str(tmp_path / "vit.npz")}
    if second_norm == "LayerNorm_1":  # not a name of that release
        with pytest.raises(UserError, match="cannot read 'vit.npz'"):
            build("vit-pocket", **flags)
    else:
        x = torch.rand(2, 1, 28, 28)
        assert torch.equal(build("vit-pocket", **flags).features(x), source.features(x))


def test_half_precision_file_becomes_float32(tmp_path):
    net = build("vit-pocket")
    half = {k: v.half() for k, v in net.body_parameters().items()}
    save_file(half, tmp_path / "half.safetensors")
    again = build("vit-pocket", backbone_weights=tmp_path / "half.safetensors")
    for name, p in again.body_parameters().items():
        assert p.dtype == torch.float32 and torch.equal(p, half[name].float())


def _without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: _without(s, "blocks.2.attn.qkv.weight"), "1 missing .blocks.2.attn.qkv.weight"),
        (lambda s: {**s, "adapter.a": torch.zeros(1)}, "1 unexpected .adapter.a"),
        (lambda s: {**s, "norm.weight": torch.zeros(64)}, r"1 of another shape .norm.weight \(64,\) instead of .128,"),
        (lambda s: {f"odd.{k}": v for k, v in s.items()}, r"54 missing .*, \.\.\.\); 54 unexpected .*, \.\.\.\)"),
    ],
)
def test_wrong_files(tmp_path, change, message):
    body = {k: v.detach().clone() for k, v in build("vit-pocket").body_parameters().items()}
    for ending, save in (("safetensors", save_file), ("pth", torch.save)):
        save(change(body), tmp_path / f"f.{ending}")
        with pytest.raises(UserError, match=message) as err:
            build("vit-pocket", backbone_weights=str(tmp_path / f"f.{ending}"))
        assert "\n" not in str(err.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        build("vit-pocket", backbone_weights=str(tmp_path / "none.pth"))
    for ending in ("safetensors", "pth", "bin", "npz"):
        file = tmp_path / f"broken.{ending}"
        file.write_bytes(b"not weights")
        with pytest.raises(UserError, match="cannot read 'broken") as err:
            build("vit-pocket", backbone_weights=str(file))
        assert "\n" not in str(err.value)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for name in ("list.pth", "other.npz"):
        with pytest.raises(UserError, match="cannot read"):
            build("vit-pocket", backbone_weights=str(tmp_path / name))
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(UserError, match="unknown ending; allowed: .safetensors"):
        build("vit-pocket", backbone_weights=str(tmp_path / "weights.onnx"))


def test_no_download(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(vit_module, "offline", lambda: True)
    with pytest.raises(UserError) as err:
        build("vit", COLOUR, vit_name="vit_base_patch16_224.augreg_in21k", pretrained=1)
    for part in ("timm/vit_base_patch16_224.augreg_in21k", "model.safetensors", "--backbone_weights", "--pretrained 0"):
        assert part in str(err.value)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_bas_patch16_224", "did you mean .*'vit_base_patch16_224'"),
        ("resnet18", "no VisionTransformer 'resnet18'"),
        ("vit_base_patch16_224.augreg_in22k", "did you mean .*'vit_base_patch16_224.augreg_in21k'"),
        ("deit_tiny_distilled_patch16_224", "not a plain timm VisionTransformer"),
    ],
)
def test_wrong_vit_names(name, message):
    with pytest.raises(UserError, match=message):
        build("vit", COLOUR, vit_name=name)


def test_pocket_without_its_weights(monkeypatch, tmp_path):
    from backbones import vit_pocket

    monkeypatch.setattr(vit_pocket, "WEIGHTS", tmp_path / "vit_pocket.safetensors")
    with pytest.raises(UserError, match="python scripts/pretrain_vit_pocket.py"):
        build("vit-pocket", pretrained=1)
    source = build("vit-pocket")
    save_file({k: v.half() for k, v in source.body_parameters().items()}, vit_pocket.WEIGHTS)
    net = build("vit-pocket", pretrained=1)
    assert torch.equal(net.norm.weight, source.norm.weight)
    with pytest.raises(ValueError, match="channels"):
        build("resnet18")(torch.rand(1, 2, 8, 8))


@pytest.mark.parametrize("method", ["ncm", "fedavg --tuning head", "slca", "hgp", "ranpac", "dolfin"])
def test_methods_that_need_more_than_a_spiking_network_has_say_so(method, tmp_path, capsys):
    """A head with bias, a transformer: one line, whichever is missing."""
    import main

    argv = f"--model {method} --backbone sresnet-pocket --dataset seq-digits --fl --device cpu --debug_mode 1".split()
    assert main.main([*argv, f"--results_path={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "--backbone" in err
