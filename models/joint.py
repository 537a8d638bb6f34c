"""All tasks at once: the upper bound. It is ``sgd`` on one task that holds every class (``--joint 1`` is implied)."""

from models.sgd import Sgd


class Joint(Sgd):
    """Training on the union of the tasks; tested on each of them."""

    NAME = "joint"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        parser.set_defaults(joint=1)
        return parser
