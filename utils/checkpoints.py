"""Checkpoints: one safetensors file of tensors and a JSON header of plain data, read without unpickling anything.

The state of a method is taken from its attributes, whatever they are called (a file written for Mammoth needs no code
for it): tensors, arrays, numbers, containers, modules, and objects with ``state_dict``/``load_state_dict`` are stored;
functions and the like stay as the constructor made them; anything else is refused by name when saving.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.utils.continual_dataset import ContinualDataset
from utils.errors import RunError, UserError
from utils.files import replacing

FORMAT = 1
# attributes that the constructor rebuilds from the settings
FIXED = set(vars(nn.Module())) | {
    "args",
    "dataset",
    "transform",
    "original_transform",
    "normalization_transform",
    "weak_transform",
    "loss",
    "opt",
    "scheduler",
    "device",
    "client",
}


def digest(tensor: torch.Tensor) -> str:
    """Fingerprint of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=12).hexdigest()


def class_name(value) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def model_attributes(model: nn.Module) -> dict:
    """What a method object holds beyond what its constructor rebuilds: attributes, child modules, own tensors."""
    return {
        "attrs": {k: v for k, v in vars(model).items() if k not in FIXED and not k.startswith("_own")},
        "modules": {k: m for k, m in model._modules.items() if k != "loss"},
        "tensors": {**model._parameters, **model._buffers},
    }


class Writer:
    """Turns values into a JSON specification plus named tensors.

    Args:
        baseline: fingerprints of the network's tensors as they were built; tensors that still have them are not stored.
        nets: the networks of the run, the one that ``baseline`` is about first. A weight of theirs that a method also
            holds elsewhere (in a list of what it trains) is stored as a reference.
    """

    def __init__(self, baseline: dict[str, str] | None = None, nets: Sequence[nn.Module] = ()) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.baseline, self.net = baseline or {}, nets[0] if nets else None
        self.seen: dict[int, tuple[str, object]] = {}  # with the object, so that no other gets its id
        self.of_net = {id(p): (i, name) for i, net in enumerate(nets) for name, p in net.named_parameters()}
        self.device = next((p.device for net in nets for p in net.parameters()), torch.device("cpu"))

    def tensor(self, value: torch.Tensor, path: str) -> str:
        while path in self.tensors:  # {1: a, "1": b}
            path += "'"
        self.tensors[path] = value.detach().cpu().clone().contiguous()
        return path

    def encode(self, value, path: str):
        """The specification of ``value``.

        Raises:
            RunError: a value that a checkpoint cannot hold, by its path.
        """
        if value is None or isinstance(value, (bool, int, str, float)):
            return value
        if id(value) in self.of_net:
            return {"of_net": self.of_net[id(value)]}
        if isinstance(value, nn.Parameter):
            return {"param": self.tensor(value, path), "grad": value.requires_grad}
        if isinstance(value, torch.Tensor):
            stays = {"host": True} if value.device.type == "cpu" != self.device.type else {}
            return {"tensor": self.tensor(value, path), "grad": value.requires_grad and value.is_leaf, **stays}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return {"ndarray": self.tensor(torch.from_numpy(np.array(value)), path)}
        if isinstance(value, np.generic):
            return {"np": value.dtype.str, "value": value.item()}
        if isinstance(value, torch.Generator):
            return {"generator": self.tensor(value.get_state(), path)}
        if isinstance(value, (torch.device, torch.dtype)):
            return {"torch": str(value).replace("torch.", "")}
        if type(value) in (list, tuple, set):
            items = sorted(value, key=repr) if isinstance(value, set) else value
            return {type(value).__name__: [self.encode(v, f"{path}.{i}") for i, v in enumerate(items)]}
        if isinstance(value, dict):
            return {
                "dict": [
                    [self.encode(k, f"{path}.key{i}"), self.encode(v, f"{path}.{k}")]
                    for i, (k, v) in enumerate(value.items())
                ],
                **({"class": class_name(value)} if type(value) is not dict else {}),
            }
        if isinstance(value, (type, ContinualDataset)) or hasattr(value, "__code__"):
            return {"code": class_name(value)}
        if id(value) in self.seen:
            return {"ref": self.seen[id(value)][0]}
        self.seen[id(value)] = path, value
        if isinstance(value, nn.Module):
            return self.module(value, path)
        if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
            return {"object": self.encode(value.state_dict(), path), "class": class_name(value)}
        if callable(value) and not hasattr(value, "__dict__"):
            return {"code": class_name(value)}
        if hasattr(value, "__dict__") and type(value).__module__.split(".")[0] in ("models", "backbones", "utils"):
            return {"fields": self.encode(dict(vars(value)), path), "class": class_name(value)}
        if callable(value):
            return {"code": class_name(value)}
        raise RunError(
            f"cannot save {path}: a checkpoint cannot hold a {class_name(value)}; give its class "
            "state_dict() and load_state_dict(), or run with --savecheck none"
        )

    def module(self, module: nn.Module, path: str):
        from models.utils.continual_model import ContinualModel

        if isinstance(module, ContinualModel):
            return {"model": self.encode(model_attributes(module), path), "class": class_name(module)}
        named = dict(module.state_dict(keep_vars=True))
        entries = {}
        for name, t in named.items():
            if not isinstance(t, torch.Tensor):
                entries[name] = self.encode(t, f"{path}.{name}")
            elif module is self.net and self.baseline.get(name) == (fp := digest(t)):
                entries[name] = {"unchanged": fp}
            else:
                entries[name] = {"tensor": self.tensor(t, f"{path}.{name}")}
        return {
            "module": entries,
            "class": class_name(module),
            "training": module.training,
            "grad": [n for n, p in module.named_parameters() if p.requires_grad],
        }


class Reader:
    """The inverse of :class:`Writer`: puts stored values back, into freshly built objects where it needs one.

    Args:
        fresh_net: makes a network like the run's own, for copies of it that a method kept (a teacher).
        nets: the networks of the run, in the writer's order.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        fresh_net: Callable[[], nn.Module] | None = None,
        device: torch.device | str = "cpu",
        nets: Sequence[nn.Module] = (),
    ) -> None:
        self.tensors, self.fresh_net, self.device, self.nets = tensors, fresh_net, device, nets
        self.by_path: dict[str, object] = {}

    def decode(self, spec, fresh=None, path: str = ""):
        """The value of a specification; ``fresh`` is what the constructor made in its place."""
        if not isinstance(spec, dict):
            return spec
        kind = next(iter(spec))
        body = spec[kind]
        if kind == "of_net":
            return self.nets[body[0]].get_parameter(body[1])
        if kind == "param":
            return nn.Parameter(self.tensors[body].to(self.device), requires_grad=spec["grad"])
        if kind == "tensor":
            device = fresh.device if isinstance(fresh, torch.Tensor) else "cpu" if "host" in spec else self.device
            return self.tensors[body].to(device).requires_grad_(spec["grad"])
        if kind == "ndarray":
            return self.tensors[body].numpy()
        if kind == "np":
            return np.dtype(body).type(spec["value"])
        if kind == "generator":
            generator = torch.Generator()
            generator.set_state(self.tensors[body])
            return generator
        if kind == "torch":
            dtype = getattr(torch, body, None)  # torch.cpu is a module
            return dtype if isinstance(dtype, torch.dtype) else torch.device(body)
        if kind in ("list", "tuple", "set"):
            olds = list(fresh) if isinstance(fresh, (list, tuple)) else []
            items = [self.decode(v, olds[i] if i < len(olds) else None, f"{path}.{i}") for i, v in enumerate(body)]
            return {"list": list, "tuple": tuple, "set": set}[kind](items)
        if kind == "dict":
            old = fresh if isinstance(fresh, dict) else {}
            pairs = [(self.decode(k), v) for k, v in body]
            new = {k: self.decode(v, old.get(k), f"{path}.{k}") for k, v in pairs}
            if type(fresh) not in (dict, type(None)) and isinstance(fresh, dict):  # an OrderedDict, a defaultdict
                fresh.clear()
                fresh.update(new)
                return fresh
            if spec.get("class", "collections.OrderedDict") != "collections.OrderedDict":
                raise UserError(f"the checkpoint holds a {spec['class']} at {path!r} that this version does not build")
            return new
        if kind == "ref":
            return self.by_path[body]
        if kind == "code":
            self.by_path[path] = fresh
            return fresh
        if fresh is not None:
            self.by_path[path] = fresh  # what it holds may refer to it
        value = {"module": self.module, "model": self.model, "object": self.object, "fields": self.fields}[kind](
            spec, fresh, path
        )
        self.by_path[path] = value
        return value

    @staticmethod
    def require(fresh, spec, path, kind: str = "") -> None:
        """Refuse to put a stored object back into nothing, or into one of another class."""
        if fresh is None or class_name(fresh) != spec["class"]:
            raise UserError(
                f"the checkpoint holds a {kind}{spec['class']} at {path!r} that this version does not build"
            )

    def object(self, spec, fresh, path):
        if fresh is None and spec["class"] == "utils.buffer.Buffer":
            from utils.buffer import Buffer

            fresh = Buffer(1)
        self.require(fresh, spec, path)
        fresh.load_state_dict(self.decode(spec["object"], None, path))
        return fresh

    def fields(self, spec, fresh, path):
        self.require(fresh, spec, path)
        vars(fresh).update(self.decode(spec["fields"], dict(vars(fresh)), path))
        return fresh

    def module(self, spec, fresh, path):
        if fresh is None:
            fresh = self.fresh_net().to(self.device) if self.fresh_net is not None else None
            self.require(fresh, spec, path, "module ")
        targets = dict(fresh.state_dict(keep_vars=True))
        if set(targets) != set(spec["module"]):
            odd = sorted(set(targets) ^ set(spec["module"]))
            raise UserError(
                f"the checkpoint does not fit the network at {path!r}: {len(odd)} names differ, first {odd[0]!r}"
            )
        for name, entry in spec["module"].items():
            target = targets[name]
            if not isinstance(target, torch.Tensor):
                fresh.get_submodule(name.rpartition(".")[0]).set_extra_state(self.decode(entry))
                continue
            if "unchanged" in entry:
                if digest(target) != entry["unchanged"]:
                    raise UserError(f"the checkpoint was made over other pretrained weights: {name!r} differs")
                continue
            stored = self.tensors[entry["tensor"]]
            if stored.shape != target.shape and target.numel():  # an empty tensor has not got its shape yet
                raise UserError(
                    f"the checkpoint does not fit: {path}.{name} is {tuple(stored.shape)} there and "
                    f"{tuple(target.shape)} here"
                )
            # a new tensor, not a copy into the old one: frozen weights may be shared with a worker
            target.data = stored.to(target.device, target.dtype)
        for name, p in fresh.named_parameters():
            p.requires_grad_(name in spec["grad"])
        return fresh.train(spec["training"])

    def model(self, spec, fresh, path):
        if fresh is None or class_name(fresh) != spec["class"]:
            raise UserError(f"the checkpoint is of {spec['class']}, this run of {class_name(fresh)}")
        state = self.decode(spec["model"], model_attributes(fresh), path)
        for name in [k for k in model_attributes(fresh)["attrs"] if k not in state["attrs"]]:
            delattr(fresh, name)
        vars(fresh).update(state["attrs"])
        for name, module in state["modules"].items():
            fresh._modules[name] = module
        for name, t in state["tensors"].items():
            (fresh._parameters if isinstance(t, nn.Parameter) or name in fresh._parameters else fresh._buffers)[
                name
            ] = t
        return fresh


def baseline_of(net: nn.Module) -> dict[str, str]:
    """Fingerprints of a network's tensors, by state-dict name."""
    return {name: digest(t) for name, t in net.state_dict().items() if isinstance(t, torch.Tensor)}


def fresh_copy(net: nn.Module) -> Callable[[], nn.Module]:
    """A maker of networks like ``net`` as it is now, without what is grafted on it later."""
    pristine = copy.deepcopy(net).cpu()
    return lambda: copy.deepcopy(pristine)


def write(
    file: Path,
    plain: dict,
    values: dict,
    baseline: dict[str, str] | None = None,
    nets: Sequence[nn.Module] = (),
) -> None:
    """Write a checkpoint under a temporary name, then rename it: a reader sees the old one or the new one.

    Args:
        plain: JSON data (settings, cursor, results). values: name to any value that :class:`Writer` takes.
        baseline, nets: see :class:`Writer`.
    """
    writer = Writer(baseline, nets)
    specs = {name: writer.encode(value, name) for name, value in values.items()}
    header = json.dumps({"format": FORMAT, "plain": plain, "specs": specs})
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, "the checkpoint ") as temporary:
        save_file(writer.tensors, temporary, metadata={"herd": header})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())


def read(file: Path) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """(plain data, specifications, tensors) of a checkpoint.

    Raises:
        UserError: not there, not a checkpoint of Herd, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"--loadcheck: there is no checkpoint at {file}; give a run folder or its checkpoint file")
    try:
        with safe_open(file, "pt") as f:
            header = json.loads((f.metadata() or {}).get("herd", "null"))
            # clones are aligned as PyTorch aligns tensors: where a tensor lies decides how some kernels add it up
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(
            f"--loadcheck: {file} cannot be read as a checkpoint ({e}); take another or start afresh"
        ) from None
    if not isinstance(header, dict):
        raise UserError(f"--loadcheck: {file} is a safetensors file but no checkpoint of Herd; give a run folder")
    if header["format"] != FORMAT:
        raise UserError(f"--loadcheck: {file} has format {header['format']}, this version reads {FORMAT}")
    return header["plain"], header["specs"], tensors
