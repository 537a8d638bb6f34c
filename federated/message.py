"""What crosses the wire: flat, named, counted.

A Message is a flat mapping of names to tensors and plain numbers. Its size is that of its serialised form
(safetensors: an 8-byte length, a JSON header padded to 8 bytes, the raw tensors), computed without serialising.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# safetensors lays tensors out by falling alignment, in this order of types, then by name
_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]


class Message(Mapping):
    """A flat mapping of names to tensors, ints, floats, bools or strings.

    Args:
        entries: the contents. Tensors are passed by reference inside one process: receivers copy, never write. They
            are made contiguous, since that is how they arrive elsewhere, and rounding may depend on the layout.
        keep: ``{name: version}`` for tensors that a client keeps once it has received them. They are sent, and
            counted, only to clients that do not hold that version yet; every client sees them in every message.

    Raises:
        TypeError: an entry that is neither a tensor (dense, of a usual type) nor a plain value, or has no usual name.
    """

    def __init__(self, entries: Mapping | None = None, keep: Mapping[str, int] | None = None, **more) -> None:
        self._entries = {**(entries or {}), **more}
        self.keep = dict(keep or {})
        for name, value in self._entries.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise TypeError(f"{name!r} cannot be the name of a message entry: give another string")
            if isinstance(value, torch.Tensor) and value.dtype in _DTYPES and value.layout is torch.strided:
                self._entries[name] = value.detach().contiguous()
            elif not isinstance(value, (int, float, str, bool)):
                odd = f"{value.dtype} {value.layout} " if isinstance(value, torch.Tensor) else ""
                raise TypeError(
                    f"message entry {name!r} is a {odd}{type(value).__name__}: only tensors, numbers and strings travel"
                )
        if not set(self.keep) <= set(self._entries):
            raise KeyError(f"keep names what the message does not hold: {sorted(set(self.keep) - set(self._entries))}")

    def __getitem__(self, name: str):
        return self._entries[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose name starts with ``prefix``, under their names without it."""
        return {
            k[len(prefix) :]: v
            for k, v in self._entries.items()
            if k.startswith(prefix) and isinstance(v, torch.Tensor)
        }

    def numbers(self) -> dict[str, int | float | str | bool]:
        """The entries that are not tensors."""
        return {k: v for k, v in self._entries.items() if not isinstance(v, torch.Tensor)}

    def clone(self) -> Message:
        """A copy with tensors of its own: what a worker sends must not change when it trains the next client."""
        return Message(
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self._entries.items()}, self.keep
        )

    def without(self, names) -> Message:
        """The message less some entries."""
        return Message({k: v for k, v in self._entries.items() if k not in names})

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def nbytes(self) -> int:
        """Bytes of the serialised message, header included: ``len(self.to_bytes())`` without making it."""
        tensors = {
            k: (_DTYPES[t.dtype], list(t.shape), t.numel() * t.element_size()) for k, t in self.tensors().items()
        }
        header: dict = {"__metadata__": self._metadata()} if self.numbers() else {}
        offset = 0
        for name in sorted(tensors, key=lambda n: (_ORDER.index(tensors[n][0]), n)):
            dtype, shape, size = tensors[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + -(-length // 8) * 8 + offset

    def _metadata(self) -> dict[str, str]:
        return {k: json.dumps(v) for k, v in self.numbers().items()}

    def to_bytes(self) -> bytes:
        """Serialise with safetensors; numbers travel in the header."""
        from safetensors.torch import save

        tensors = self.tensors()
        storages = {v.untyped_storage().data_ptr() for v in tensors.values() if v.numel()}
        if len(storages) < sum(v.numel() > 0 for v in tensors.values()):  # safetensors refuses shared storage
            tensors = {k: v.clone() for k, v in tensors.items()}
        return save(tensors, metadata=self._metadata() or None)

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """The inverse of :meth:`to_bytes`; every tensor has storage of its own, aligned as PyTorch aligns it."""
        from safetensors.torch import load

        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        tensors = {k: v.clone() for k, v in load(data).items()}
        return cls({**tensors, **{k: json.loads(v) for k, v in metadata.items()}})


class Reply(Message):
    """A client's answer: a Message that knows who sent it."""

    def __init__(self, message: Mapping, client: int) -> None:
        super().__init__(message)
        self.client = client
