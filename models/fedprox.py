"""FedProx (Li et al. 2020, arXiv 1812.06127, Alg. 2): clients stay near the server's weights theta^t.

    min_theta  L_c(theta) + mu/2 |theta - theta^t|^2

mu is ``--fedprox_mu``; 0 is FedAvg. The paper tunes it in {0.001, 0.01, 0.1, 1}.
"""

from __future__ import annotations

from models.fedavg import FedAvg
from utils.args import number


class FedProx(FedAvg):
    """FedAvg with a proximal term, over whatever ``--tuning`` trains."""

    NAME = "fedprox"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        parser.add_argument("--fedprox_mu", type=number(float, 0), default=0.01, help="weight of the proximal term")
        return parser

    def before_local(self, message, client) -> None:
        self._own_start = message

    def local_penalty(self, trained, client):
        far = sum((p - self._own_start[name]).square().sum() for name, p in trained.items())
        return self.args.fedprox_mu / 2 * far
