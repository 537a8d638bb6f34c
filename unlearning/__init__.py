"""The registry of ways to forget a client: a name leads to a file, and only the chosen file is imported.

A way to unlearn is a class that is mixed into whatever method has trained the model (models/utils/unlearner.py), so
each works on every federated method: ``--model fedprox --unlearn pga --unlearn_client 3``.
"""

from __future__ import annotations

from utils import registry


def get_unlearner_class(name: str) -> type:
    """The class called ``name``. Imports only its file.

    Raises:
        UserError: no file holds that name.
    """
    return registry.load_class("unlearning", name, "--unlearn")


def unlearning(cls: type, name: str) -> type:
    """A method with a way to unlearn mixed in; checkpoints take it for the method itself."""
    how = get_unlearner_class(name)
    space = {"NAME": cls.NAME, "UNLEARNER": how.NAME, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (how, cls), space)
