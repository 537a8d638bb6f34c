"""CCVR, classifier calibration with virtual representations (Luo et al. 2021, arXiv 2106.05001).

After training by FedAvg the classifier alone is trained again, on features that are drawn from one Gaussian per class
(Alg. 1). Clients send n, mean and covariance of each of their classes under the global model; the server pools them
exactly (eq. 3 and 4, models/utils/prototypes.py). The paper calibrates once, at the end of training; over a sequence of
tasks that is the end of each (``--ccvr_when task``), with the statistics of older classes as their own task left them.

``--model_config fm``: as fed-mammoth has it: a mixture of the clients' own diagonal Gaussians, after every round, the
current task's classes alone, logits of one length. Its statistics are taken from images without normalisation, which
is not reproduced. The number of virtual features per class and their power transform are not certain in the paper:
``--rebalance_samples`` is ours, there is no transform.
"""

from __future__ import annotations

from models.fedavg import FedAvg
from models.utils.calibrated import AFTER_THE_TASK, Calibrated, add_calibration_args


class Ccvr(Calibrated, FedAvg):
    """FedAvg over whatever ``--tuning`` trains, and a calibrated classifier."""

    NAME = "ccvr"
    COMPATIBILITY = ["class-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        add_calibration_args(parser, **AFTER_THE_TASK, tau=0.0)
        return parser
