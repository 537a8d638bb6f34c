"""Messages: sizes without serialising, round trips, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from federated.message import Message, Reply
from utils.checkpoints import digest

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
NAMES = ["w", "head.weight", "Größe", "重み.0", "a b\t\n\"\\/'", "\x7f\x01", "😀", "", "x" * 200, "é" * 7]
NUMBERS = {"n": 3, "loss": 0.1, "nan": math.nan, "inf": -math.inf, "on": True, "tag": 'ü"\n', "big": 10**30, "e": ""}


def tensor(dtype, shape, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * 50).to(dtype)


def same(a: Message, b: Message) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert b[name].dtype == value.dtype and b[name].shape == value.shape
            assert digest(value) == digest(b[name])
        else:
            assert type(b[name]) is type(value) and (b[name] == value or value != value)


MESSAGES = {
    "empty": {},
    "numbers": NUMBERS,
    "one number": {"n": 1},
    "all types": {str(d): tensor(d, (3, 2)) for d in DTYPES},
    "all types and numbers": {**NUMBERS, **{f"{i} {d}": tensor(d, (i, 2)) for i, d in enumerate(DTYPES * 3)}},
    "shapes": {str(s): tensor(torch.float32, s) for s in [(), (0,), (1,), (2, 0, 3), (1, 1, 1, 1), (5,), (1000, 3)]},
    "names": {n: tensor(DTYPES[i], (i, 3)) for i, n in enumerate(NAMES)},
    "names of numbers": {n: i for i, n in enumerate(NAMES)},
    "only empty tensors": {"a": torch.empty(0), "b": torch.empty(0, 4)},
    "many": {f"layer.{i}.weight": tensor(DTYPES[i % 10], (i,)) for i in range(150)},
    "strided": {"t": torch.arange(12.0).view(3, 4).T, "every other": torch.arange(10)[::2]},
    "parameter": {"p": nn.Parameter(torch.ones(2, 2))},
}


@pytest.mark.parametrize("entries", MESSAGES.values(), ids=MESSAGES)
def test_size_is_that_of_the_bytes_and_nothing_is_lost(entries):
    message = Message(entries)
    data = message.to_bytes()
    assert message.nbytes == len(data)
    same(message, Message.from_bytes(data))
    same(message, message.clone())


def test_size_for_any_length_of_the_header():
    """The header is padded to 8 bytes: every remainder must come out right."""
    for n, m in itertools.product(range(17), range(3)):
        message = Message({"x" * n + str(i): tensor(torch.int8, (n + i,)) for i in range(m)}, k="y" * n)
        assert message.nbytes == len(message.to_bytes()), (n, m)


def test_tensors_of_one_storage_can_be_sent():
    """A factor that two layers share, or slices of one tensor: what arrives is independent of it."""
    whole = torch.arange(6.0)
    message = Message({"a": whole[:3], "b": whole[:3], "c": whole})
    assert message.nbytes == len(message.to_bytes())
    same(message, Message.from_bytes(message.to_bytes()))


@pytest.mark.parametrize("entries", MESSAGES.values(), ids=MESSAGES)
def test_a_layout_is_the_same_on_both_sides(entries):
    """Kernels may round by strides and alignment: what arrives has those of a fresh tensor."""
    sent = Message(entries)
    arrived = Message.from_bytes(sent.to_bytes())
    for name, t in sent.tensors().items():
        assert t.is_contiguous() and arrived[name].stride() == t.stride()
        assert arrived[name].data_ptr() % 64 == 0


def test_payload_is_the_tensors_alone():
    assert Message({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.bool)}, n=1).payload_bytes == 62


def test_what_travels_is_detached_and_by_reference():
    p = nn.Parameter(torch.ones(3))
    message = Message({"p": p, "q": p * 2})
    assert not message["p"].requires_grad and message["q"].grad_fn is None
    assert message["p"].data_ptr() == p.data_ptr()
    assert message.clone()["p"].data_ptr() != p.data_ptr()


@pytest.mark.parametrize(
    "value",
    [None, [1, 2], (1,), {"a": 1}, np.zeros(3), np.int64(3), np.float32(1), b"x", 1j, object(), nn.Linear(1, 1), len],
    ids=lambda v: type(v).__name__,
)
def test_only_tensors_and_plain_values_travel(value):
    with pytest.raises(TypeError, match=r"'odd' is a .*only tensors, numbers and strings travel"):
        Message({"fine": torch.zeros(1), "odd": value})


@pytest.mark.parametrize("odd", [torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()])
def test_tensors_without_a_serialised_form_are_refused(odd):
    with pytest.raises(TypeError, match="'odd' is a .*only tensors"):
        Message(odd=odd)


@pytest.mark.parametrize("name", [1, None, ("a", 1), "__metadata__"])
def test_names_are_strings(name):
    with pytest.raises(TypeError, match="name"):
        Message({name: torch.zeros(1)})


def test_keep_names_what_is_there():
    with pytest.raises(KeyError, match="'b'"):
        Message({"a": 1}, keep={"b": 0})
    message = Message({"a": torch.zeros(2), "b": 1}, keep={"a": 3})
    assert message.clone().keep == {"a": 3}
    assert set(message.without(["a"])) == {"b"} and message.without(["a"]).keep == {}


def test_views_of_a_message():
    message = Message({"head.w": torch.ones(1), "head.b": 2, "body.w": torch.zeros(1)}, n=5)
    assert list(message.tensors("head.")) == ["w"] and list(message.tensors()) == ["head.w", "body.w"]
    assert message.numbers() == {"head.b": 2, "n": 5}
    assert len(message) == 4 and "n" in message and message.get("m", 0) == 0
    reply = Reply(message, 7)
    assert reply.client == 7 and reply.nbytes == message.nbytes
