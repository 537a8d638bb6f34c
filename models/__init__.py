"""The methods: one flat file per paper, found by name (see utils/registry.py). To add one, add a file."""

from __future__ import annotations

from utils import registry


def get_model_names() -> list[str]:
    """The names ``--model`` takes."""
    return list(registry.scan("models"))


def get_model_class(name: str) -> type:
    """The class of a method; imports its file only.

    Raises:
        UserError: unknown name (with the nearest ones) or a missing optional package.
    """
    return registry.load_class("models", name, "model")


def get_model(args, backbone, loss, transform, dataset):
    """Build the method ``args.model`` over ``backbone``."""
    from models.utils.continual_model import construct

    return construct(get_model_class(args.model), backbone, loss, args, transform, dataset)
