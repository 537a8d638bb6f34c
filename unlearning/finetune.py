"""Fine-tuning: the others go on training, and the model forgets what nobody repeats."""

from __future__ import annotations

from models.utils.unlearner import Unlearner
from utils.args import number


class FineTune(Unlearner):
    NAME = "finetune"

    @staticmethod
    def get_parser(parser):
        parser.add_argument(
            "--finetune_rounds", type=number(int, 0), default=None, help="rounds; default: --num_comm_rounds"
        )
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        rounds = self.args.finetune_rounds
        self.more_rounds(self.rest(clients, who), self.args.num_comm_rounds if rounds is None else rounds, "finetune")
