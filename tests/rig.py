"""Experiments driven from Python: what main.py builds, run whole or piece by piece."""

import shlex

from datasets.utils.partition import Partition
from federated.clients import Clients, Ledger
from federated.engines import make_engine
from federated.simulator import simulate
from main import build
from utils import checkpoints
from utils.args import parse_args
from utils.loggers import Run
from utils.training import Session, train_central

POCKET = "--dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu"
MLP = "--dataset seq-digits --backbone mnistmlp --device cpu"


class Rig:
    """One experiment: its objects, and the ways to run all of it or a part."""

    def __init__(self, flags: str, folder):
        self.flags, self.folder = flags, folder
        self.args = parse_args([*shlex.split(flags), "--results_path", str(folder)])
        self.dataset, self.model, self.worker, self.fresh_net = build(self.args)
        self.partition = Partition.make(self.dataset, self.args) if self.worker is not None else None
        self.states: dict[int, dict] = {}
        self.ledger = Ledger()

    # ---- all of it

    def run(self, checkpoint=None, **settings):
        """The whole run, or what is left of it after a checkpoint (a file)."""
        vars(self.args).update(settings)
        self.record = Run.create(self.args)
        self.session = Session(self.args, self.dataset, self.model, self.record, self.fresh_net)
        stored = checkpoints.read(checkpoint) if checkpoint is not None else None
        try:
            if self.worker is not None:
                simulate(self.session, self.worker, self.partition, stored)
                self.states = self.session.parts["clients"]()
                self.ledger.load(self.session.parts["ledger"]())
            else:
                train_central(self.session, stored)
        finally:
            self.record.close()
        return self

    # ---- federated, piece by piece

    def clients(self, task: int, round_: int = -1, ids=None) -> Clients:
        """The clients of a phase, in client order."""
        sizes = {i: n for i, n in enumerate(self.partition.sizes(task)) if n > 0}
        self.engine = make_engine(self.worker, self.partition, self.states, self.args, print)
        return Clients(sizes if ids is None else ids, self.engine, self.ledger, task, round_)

    def begin(self, task: int) -> "Rig":
        """Everything before the rounds of a task."""
        while self.dataset.c_task < task:
            self.dataset.get_data_loaders()
        self.model.meta_begin_task(self.dataset)
        self.model.begin_rounds(self.clients(task))
        return self

    def round(self, task: int, round_: int, ids=None) -> "Rig":
        self.model.round(self.clients(task, round_, ids), round_)
        return self

    def end(self, task: int) -> "Rig":
        """Everything after the rounds of a task."""
        self.model.end_rounds(self.clients(task))
        self.model.meta_end_task(self.dataset)
        return self

    @property
    def weights(self) -> dict:
        """Copies of the network's tensors."""
        return {n: t.clone() for n, t in self.model.net.state_dict().items()}
