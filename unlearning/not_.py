"""NoT: weights of one layer change their sign, the others train on (Khalil et al. 2025, "NoT: Federated unlearning via
weight negation").

Which layers beyond the first is not known to us; the default is the first tensor of what is trained, as in a public
port. The model is of no use until the others have trained on: give --recover_rounds.
"""

from __future__ import annotations

from models.utils.unlearner import Unlearner
from utils.errors import UserError


class NoT(Unlearner):
    NAME = "not"
    ON_TASK_VECTORS = False

    @staticmethod
    def get_parser(parser):
        parser.add_argument(
            "--not_layers",
            nargs="+",
            default=None,
            metavar="NAME",
            help="tensors to negate, by the end of their name; default: the first that is trained",
        )
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        mine, wanted = self.trained(), self.args.not_layers
        names = [next(iter(mine))] if wanted is None else [n for n in mine if any(n.endswith(w) for w in wanted)]
        if not names:
            raise UserError(
                f"--not_layers {' '.join(wanted)}: nothing that is trained ends so; there are {', '.join(mine)}"
            )
        self.set_trained({n: -mine[n] for n in names})
