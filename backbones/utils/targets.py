"""How layers are named on the command line and in method files: ``'attn.qkv'``, ``'blocks.0.attn.qkv:k,v'``."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from utils.errors import UserError


class TargetError(UserError, ValueError):
    """A target that does not fit the network: the user's mistake, since targets come from ``--lora_targets``."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} (--lora_targets, --backbone)")


def linear_layers(net: nn.Module, targets: str | Sequence[str]) -> dict[str, list[str]]:
    """The linear layers that ``targets`` name: {layer name: the targets that matched it}, in the network's order.

    A target is a layer's name, the end of one (``attn.qkv``) or a glob (``blocks.[0-3].attn.qkv``); what follows a
    colon is ignored here. TargetError if a target matches no linear layer.
    """
    # The out_proj of nn.MultiheadAttention is used without being called: a hook there would never run.
    names = [
        n
        for n, m in net.named_modules()
        if isinstance(m, nn.Linear) and not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]
    targets = [targets] if isinstance(targets, str) else list(targets)
    found: dict[str, list[str]] = {}
    for target in targets:
        pattern = target.partition(":")[0]
        hits = [n for n in names if pattern and (fnmatchcase(n, pattern) or fnmatchcase(n, "*." + pattern))]
        if not hits:
            kinds = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", n) for n in names))
            raise TargetError(f"no linear layer matches target '{target}'; available: {', '.join(kinds) or 'none'}")
        for n in hits:
            found.setdefault(n, []).append(target)
    return {n: found[n] for n in names if n in found}


def slices_of(name: str, linear: nn.Linear, targets: list[str]) -> str:
    """The rows of layer ``name`` that its targets ask for together: 'all', or letters of 'qkv' in this order.

    TargetError for a slice that is not q, k or v, on a layer without slices, or beside the whole layer.
    """
    asked: set[str] = set()
    for target in targets:
        _, colon, text = target.partition(":")
        parts = {p.strip() for p in text.split(",")} if colon else {"all"}
        if not parts <= {"all"} and not parts <= set("qkv"):
            raise TargetError(f"unknown slice in target '{target}'; available: q, k, v (comma separated)")
        if parts != {"all"} and linear.out_features % 3:
            raise TargetError(
                f"target '{target}': the {linear.out_features} outputs of '{name}' are not divisible by "
                "3, so it has no q, k, v slices; name the whole layer"
            )
        asked |= parts
    if "all" in asked and len(asked) > 1:
        raise TargetError(
            f"layer '{name}' is targeted both as a whole and by slices ({', '.join(targets)}); choose one"
        )
    return "all" if "all" in asked else "".join(s for s in "qkv" if s in asked)
