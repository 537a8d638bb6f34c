"""Checkpoints: whatever a method keeps comes back, nothing is unpickled, and what cannot be saved is named."""

from __future__ import annotations

import collections
import copy
import json
import math
import pathlib
import pickle
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from models.utils.gpm import DualGPM
from tests.helpers import only_folder, run, small_args
from utils import checkpoints
from utils.buffer import Buffer
from utils.checkpoints import Reader, Writer, baseline_of, fresh_copy
from utils.errors import RunError, UserError


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch):
    """Nothing here may unpickle."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)


def net(seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def through_file(value, tmp_path, fresh=None, nets=(), fresh_net=None, baseline=None, **more):
    """``value`` written and read again."""
    file = tmp_path / "checkpoint" / "c.safetensors"
    checkpoints.write(file, {"p": 1}, {"value": value, **more}, baseline, nets)
    assert [f.name for f in file.parent.iterdir()] == ["c.safetensors"]  # no temporary file is left
    plain, specs, tensors = checkpoints.read(file)
    assert plain == {"p": 1}
    return Reader(tensors, fresh_net, "cpu", nets).decode(specs["value"], fresh, "value")


def same(a, b) -> bool:
    """Equal in value, type, dtype and shape, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and checkpoints.digest(a) == checkpoints.digest(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(k) is type(j) and same(a[k], b[k]) for k, j in zip(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


VALUES = {
    "plain": [None, True, False, 0, -3, 10**40, 0.1, math.inf, -math.inf, math.nan, "", 'ü"\n\0', 1e-320],
    "nested": {"a": [(1, (2, [3])), {"b": ({"c": set()},)}], "d": {1, 2, 3}, "e": {(1, "x"), (2, "y")}, "f": {}},
    "mixed set": {1, "a", (2, 3), None},
    "keys": {1: "int", "1": "str", (1, 2): "tuple", None: "none", 1.5: "float", False: "bool"},
    "like names": {1: torch.zeros(2), "1": torch.ones(3), "a.b": torch.ones(1), "a": {"b": torch.ones(4)}},
    "types": {
        str(d): torch.arange(6).reshape(2, 3).to(d)
        for d in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
            *(torch.int8, torch.uint8, torch.bool),
        )
    },
    "shapes": [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.empty(0), torch.ones(1, 1)],
    "special floats": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
    "strided": torch.arange(12).reshape(3, 4).T,
    "arrays": [np.arange(3), np.zeros((2, 0)), np.array(1.5), np.array([True]), np.float16([1]), np.ones(4, "u2")],
    "reversed array": np.arange(5)[::-1],
    "numpy numbers": [np.int64(3), np.float32(0.1), np.bool_(True), np.uint8(255)],
    "torch": [torch.device("cpu"), torch.float32, torch.device("cuda:1")],
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_plain_data_comes_back(tmp_path, value):
    assert same(through_file(value, tmp_path), value)


def test_generators_go_on(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    again = through_file({"g": [generator]}, tmp_path)["g"][0]
    assert torch.equal(torch.rand(9, generator=again), torch.rand(9, generator=generator))


def test_tensors_are_copies_and_keep_what_autograd_needs(tmp_path):
    leaf, p = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(3), requires_grad=False)
    out = through_file([leaf, p, leaf * 2], tmp_path)
    assert [t.requires_grad for t in out] == [True, False, False]
    assert isinstance(out[1], nn.Parameter) and not isinstance(out[0], nn.Parameter)


def test_buffers_come_back_wherever_they_are(tmp_path):
    buffer = Buffer(5)
    np.random.seed(0)
    buffer.add_data(torch.rand(9, 1, 2, 2), labels=torch.arange(9), logits=torch.rand(9, 3))
    again = through_file({"of client": {3: [buffer, Buffer(2)]}}, tmp_path)["of client"][3]
    assert again[0].num_seen_examples == 9 and again[1].is_empty() and len(again[0]) == again[0].buffer_size == 5
    assert all(torch.equal(a, b) for a, b in zip(again[0].get_all_data(), buffer.get_all_data(), strict=True))


def test_a_teacher_made_on_the_way_comes_back(tmp_path):
    mine = net()
    teacher = copy.deepcopy(mine).eval().requires_grad_(False)
    with torch.no_grad():
        mine[0].weight += 1
    for _ in range(3):
        mine(torch.rand(8, 4))
    out = through_file({"old": [teacher, mine]}, tmp_path, fresh_net=fresh_copy(net(1)))["old"]
    assert not out[0].training and out[1].training and out[0] is not out[1]
    assert not any(p.requires_grad for p in out[0].parameters()) and all(p.requires_grad for p in out[1].parameters())
    assert same(dict(out[0].state_dict()), dict(teacher.state_dict()))
    assert same(dict(out[1].state_dict()), dict(mine.state_dict()))


def test_objects_with_state_are_filled_again(tmp_path):
    def memory(seed):
        m = DualGPM(4)
        m.update(torch.rand(9, 4, generator=torch.Generator().manual_seed(seed)).T.cov(), 0.9)
        return m

    old = {"layers": [memory(0), memory(1)], "by name": {"a": memory(2)}}
    new = {"layers": [DualGPM(4), DualGPM(4)], "by name": {"a": DualGPM(4)}}
    out = through_file(old, tmp_path, fresh=new)
    assert out["layers"][1] is new["layers"][1]
    assert torch.equal(out["layers"][1].basis, old["layers"][1].basis)
    assert torch.equal(out["by name"]["a"].basis, old["by name"]["a"].basis)


def test_optimisers_come_back(tmp_path):
    a, b = net(), net(1)
    opts = [torch.optim.Adam(n.parameters()) for n in (a, b)]
    for _ in range(2):
        a(torch.rand(5, 4)).sum().backward()
        opts[0].step()
    through_file(opts[0], tmp_path, fresh=opts[1])
    mine, theirs = opts[0].state_dict(), opts[1].state_dict()
    assert mine["state"].keys() == theirs["state"].keys() and len(mine["state"]) == 6
    assert all(same(mine["state"][k], theirs["state"][k]) for k in mine["state"])


def test_one_object_in_two_places_stays_one(tmp_path):
    mine, buffer, f = net(), Buffer(3), torch.sign
    fresh_buffer = Buffer(3)
    old = {"net": mine, "alias": mine, "b": [buffer, buffer], "f": f, "g": f}
    new = {"net": mine, "alias": mine, "b": [fresh_buffer, fresh_buffer], "f": f, "g": f}
    old |= {"p": mine[0].weight, "all": list(mine.parameters())}
    out = through_file(old, tmp_path, new, nets=[mine])
    assert out["net"] is out["alias"] is mine and out["b"][0] is out["b"][1] and out["f"] is out["g"] is f
    assert out["p"] is mine[0].weight
    assert all(p is q for p, q in zip(out["all"], mine.parameters(), strict=True))


def test_the_parameters_of_every_network_of_the_run_are_told_apart(tmp_path):
    nets = [net(), net(1)]
    out = through_file([nets[1][0].bias, nets[0][0].bias], tmp_path, nets=nets)
    assert out[0] is nets[1][0].bias and out[1] is nets[0][0].bias


def test_short_lived_objects_are_not_taken_for_one_another(tmp_path):
    """Objects that only exist while they are written: a later one must not inherit the id of an earlier one."""
    writer = Writer()
    assert all("object" in writer.encode(Buffer(2), str(i)) for i in range(50))


def test_subclasses_of_dict(tmp_path):
    counts = collections.defaultdict(int, {1: 2})
    fresh = collections.defaultdict(int)
    assert through_file({"c": counts}, tmp_path, fresh={"c": fresh})["c"] is fresh and fresh == {1: 2} and fresh[5] == 0
    assert through_file(collections.OrderedDict(a=1), tmp_path) == {"a": 1}
    with pytest.raises(UserError, match=r"collections.defaultdict at 'value.c' that this version does not build"):
        through_file({"c": counts}, tmp_path)


@pytest.mark.parametrize(
    "odd",
    [
        object(), 1j, b"x", pathlib.Path("x"), slice(1), collections.deque([1]), (i for i in "ab"), np.array(["a"]),
        np.array([object()]), types.SimpleNamespace(a=1), range(3),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_what_cannot_be_saved_is_named(tmp_path, odd):
    with pytest.raises(RunError, match=r"cannot save value\.memory\.7\.1: a checkpoint cannot hold a .*state_dict"):
        through_file({"memory": {7: [0, odd]}}, tmp_path)
    assert not (tmp_path / "checkpoint").exists()


def test_a_method_that_cannot_be_saved_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    from models.sgd import Sgd

    monkeypatch.setattr(Sgd, "begin_task", lambda self, dataset: setattr(self, "odd", object()), raising=False)
    assert run([*small_args("sgd", False), "--savecheck=task"], tmp_path) == 1
    assert capsys.readouterr().err.startswith("run failed: cannot save model.attrs.odd: a checkpoint cannot hold")
    assert run([*small_args("sgd", False), "--stop_after=1"], tmp_path) == 0


# ---- the network


def test_unchanged_weights_are_not_stored(tmp_path):
    mine = net()
    baseline = baseline_of(mine)
    with torch.no_grad():
        mine[2].weight += 1
    writer = Writer(baseline, [mine])
    spec = writer.encode({"net": mine, "teacher": copy.deepcopy(mine)}, "x")
    stored = {n for n in writer.tensors if n.startswith("x.net.")}
    assert stored == {"x.net.2.weight"} and "x.teacher.0.weight" in writer.tensors
    fresh = {"net": net(), "teacher": net(4)}
    out = Reader(writer.tensors).decode(spec, fresh, "x")
    assert out["net"] is fresh["net"] and same(dict(out["net"].state_dict()), dict(mine.state_dict()))
    assert same(dict(out["teacher"].state_dict()), dict(mine.state_dict()))
    with pytest.raises(UserError, match=r"made over other pretrained weights: '0.weight' differs"):
        Reader(writer.tensors).decode(spec, {"net": net(9), "teacher": net()}, "x")


def test_what_lies_on_the_cpu_beside_a_gpu_stays_there():
    elsewhere = net().to("meta")  # stands for a GPU
    writer = Writer(nets=[elsewhere])
    spec = writer.encode({"table": torch.arange(3), "nested": [torch.ones(2)]}, "x")
    back = Reader(writer.tensors, device="meta").decode(spec)
    assert torch.equal(back["table"], torch.arange(3)) and back["nested"][0].device.type == "cpu"
    writer = Writer(nets=[net()])  # all on the CPU: where it belongs is up to the reader
    assert Reader(writer.tensors, device="meta").decode(writer.encode(torch.ones(2), "x")).is_meta


def test_loading_gives_new_tensors_where_weights_may_be_shared(tmp_path):
    mine, other = net(), net(1)
    shared = other[0].weight.data
    before = shared.clone()
    out = through_file(mine, tmp_path, fresh=other)
    assert torch.equal(shared, before) and torch.equal(out[0].weight, mine[0].weight)


def test_a_network_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"value.2.weight is \(2, 3\) there and \(5, 3\) here"):
        through_file(net(), tmp_path, fresh=nn.Sequential(*net()[:2], nn.Linear(3, 5)))
    with pytest.raises(UserError, match=r"does not fit the network at 'value': 2 names differ, first '2.bias'"):
        through_file(net(), tmp_path, fresh=net()[:2])
    with pytest.raises(UserError, match="a module torch.nn.*Sequential at 'value' that this version does not build"):
        through_file(net(), tmp_path, fresh_net=lambda: nn.Linear(1, 1))


def test_a_frozen_backbone_is_not_in_the_file(tmp_path):
    argv = [*small_args("dolfin", True), "--savecheck=task", "--stop_after=1", "--dolfin_basis=random"]
    assert run(argv, tmp_path) == 0
    with safe_open(only_folder(tmp_path) / "checkpoint" / "last.safetensors", "pt") as f:
        header = json.loads(f.metadata()["herd"])
        names = list(f.keys())
    stored = header["specs"]["model"]["model"]["dict"]
    weights = dict(dict(stored)["modules"]["dict"])["net"]["module"]
    unchanged = {n for n, entry in weights.items() if "unchanged" in entry}
    assert {n.rsplit(".", 1)[0] for n in weights.keys() - unchanged} == {
        *(f"blocks.{i}.attn.qkv" for i in range(4)),
        "classifier",
    }
    assert len([n for n in names if n.startswith("model.modules.net.")]) == len(weights) - len(unchanged)


# ---- the file


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read as a checkpoint"),
        (b"hello, world, this is no checkpoint", "cannot be read as a checkpoint"),
        (b"\x80\x04\x95", "cannot be read as a checkpoint"),
        ("half", "cannot be read as a checkpoint"),
        ("foreign", "a safetensors file but no checkpoint of Herd"),
        ("future", "has format 99, this version reads 1"),
        (None, "there is no checkpoint at"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    file = tmp_path / "c.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "half":
        checkpoints.write(file, {}, {"t": torch.ones(1000)})
        file.write_bytes(file.read_bytes()[:-1000])
    elif content == "foreign":
        save_file({"t": torch.ones(3)}, file)
    elif content == "future":
        save_file({"t": torch.ones(3)}, file, metadata={"herd": json.dumps({"format": 99})})
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.read(file)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "c.safetensors"
    checkpoints.write(file, {"n": 1}, {"t": torch.ones(2)})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(RunError, match="cannot write the checkpoint .*No space left on device"):
        checkpoints.write(file, {"n": 2}, {"t": torch.ones(2)})
    assert checkpoints.read(file)[0] == {"n": 1} and [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


def test_whole_runs_unpickle_nothing(tmp_path):
    for model, fl in (("derpp", False), ("lwf", True)):
        argv = [*small_args(model, fl), "--savecheck=round"]
        assert run([*argv, "--stop_after=1"], tmp_path / model) == 0
        assert run([*argv, "--stop_after=2"], tmp_path / model, "--loadcheck=auto") == 0
        assert run([*argv, "--stop_after=2"], tmp_path / model, "--loadcheck=auto") == 0


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(()), torch.empty(0), torch.zeros(2, 2).T])
def test_digest_tells_values_apart(tensor):
    assert checkpoints.digest(tensor) == checkpoints.digest(tensor.clone())
    if tensor.numel():
        assert checkpoints.digest(tensor) != checkpoints.digest(tensor + 1e-30)
