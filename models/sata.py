"""SATA: clients removed from a federated model by task arithmetic in the tangent regime (Santi, Salami, Calderara).

    fed   tau_k = LocalTrain(f_lin, start tau, D_k);   tau <- tau + sum_k p_k (tau_k - tau)         p_k = n_k / n
    iso   iota_k = LocalTrain(f_lin, start iota_k, D_k)       never averaged, never overwritten by the server

    to forget U:   tau' = (tau - sum_{u in U} lambda_u iota_u) / (1 - rho sum_{u in U} p_u)        no rounds

This is a RECONSTRUCTION. The paper was not available; its abstract says that a client is removed at once, with task
arithmetic and the neural tangent kernel, and a second-hand summary that each client trains two vectors of which one
stays isolated and is subtracted in the end. Everything else is a choice made here, and a flag:

    --sata_lambda    one   1 (the plain reading; preset ``paper`` with rho 0)
                     p     p_u; with rho 1 (preset ``exact1``) exactly what retraining gives after one round
                     proj  <tau, iota> / |iota|^2: the part of tau along iota is taken out
                     val   of 21 values in [0, 1] the one with the lowest accuracy on the leaving client's held-out
                           images that leaves 95 % of the others'
    --iso_schedule   every_round: as many steps as the other vector; once: in the first round of a task; on_request:
                     when it is needed, which asks for the client's data then
    --iso_custody    client (nothing leaves it before a request), or server (sent with every update)
    --sata_source    iota, or fed_history: what the client's updates added to tau over the rounds, sum_t p_u D_u,t

lambda matters more than anything else: with overlapping data 1 is the worst choice there is, with disjoint data and
many rounds p_u is. Subtraction is exact after one round, or where J_u J_k^T = 0; otherwise it is an approximation.

With ``--lora_r`` both vectors grow by B A, of low rank, in every turn (models/task_arithmetic.py), and all arithmetic
is on products: a mean of factors is not the factor of a mean.

The classifier is fixed and made of class means of features under theta_0 (CLIP's text where there is one). Those are
sums over clients, so what a leaving client gave to them is taken out exactly. With several tasks, as everywhere in task
arithmetic, each task has vectors of its own.

Whoever holds the model before and after a removal knows lambda iota_u: publishing both reveals it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from federated.message import Message
from models.task_arithmetic import TaskArithmetic
from models.utils.task_vectors import KEPT, combined
from utils.args import add_switch, number
from utils.errors import RunError, UserError

GRID = [i / 20 for i in range(21)]

Vector = Mapping[str, Tensor]


def removed(
    tau: Vector, iotas: Sequence[Vector], lambdas: Sequence[float], shares: Sequence[float] = (), renorm: float = 0.0
) -> dict[str, Tensor]:
    """(tau - sum_u lambda_u iota_u) / (1 - rho sum_u p_u).

    Raises:
        ValueError: rho sum_u p_u is 1 or more: nobody is left.
    """
    rest = 1 - renorm * sum(shares)
    if rest <= 1e-9:
        raise ValueError("no client is left that tau could be of")
    return combined([tau, *iotas], [1 / rest, *(-lam / rest for lam in lambdas)])


def projection(tau: Vector, iota: Vector) -> float:
    """<tau, iota> / |iota|^2; 0 for a vector of length 0."""
    inner = sum(float((tau[n].double() * iota[n].double()).sum()) for n in iota)
    length = sum(float(t.double().square().sum()) for t in iota.values())
    return inner / length if length else 0.0


class Sata(TaskArithmetic):
    """Two task vectors a client, one of which waits for the day it asks to be forgotten."""

    NAME = "sata"
    FEDERATED_ONLY = True
    UNLEARNS = True
    UNLEARNING_FLAGS = ("sata_lambda", "sata_renorm", "sata_head")
    UPDATES = ("isolated_update",)

    @staticmethod
    def get_parser(parser):
        TaskArithmetic.get_parser(parser)
        add = parser.add_argument
        add(
            "--sata_lambda", choices=("one", "p", "val", "proj"), default="one", help="coefficient of what is taken out"
        )
        add("--sata_renorm", type=number(float, 0, 1), default=0.0, help="rho")
        add("--sata_source", choices=("iso", "fed_history"), default="iso", help="what is taken out")
        add("--sata_aggregate", choices=("mean", "sum"), default="mean", help="how clients' steps are put together")
        add(
            "--iso_schedule",
            choices=("every_round", "once", "on_request"),
            default="every_round",
            help="when the isolated vector is trained",
        )
        add(
            "--iso_epochs",
            type=number(int, 1),
            default=None,
            help="its epochs, for once and on_request (default: those of all rounds together)",
        )
        add("--iso_custody", choices=("client", "server"), default="client", help="who keeps it")
        add_switch(parser, "--sata_head", default=1, help="1: a leaving client's part of the classifier goes too")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if args.iso_custody == "server" and args.iso_schedule == "on_request":
            raise UserError("--iso_custody server: there is nothing to keep with --iso_schedule on_request")
        if args.merging != "ta":
            raise UserError("sata takes vectors out of a sum: leave --merging at ta")
        super().__init__(backbone, loss, args, transform, dataset)
        # task -> client -> what is to be taken out, where the server keeps it: iota, or sum_t p_u D_u,t
        self.stored: dict[int, dict[int, dict[str, Tensor]]] = {}
        self.sizes: dict[int, dict[int, int]] = {}  # task -> client -> n_k of those that took part
        self.isolating: dict[int, list[int]] = {}  # task -> clients that have trained an iota

    def fresh_state(self) -> dict:
        return {"iso": {}}

    # ---------------------------------------------------------------- server: learning

    def round(self, clients, r: int) -> None:
        """A round of tau; then those who took part take theirs of iota, if it is time for it."""
        self._own_took_part: list[int] = []
        super().round(clients, r)
        known = self.isolating.get(self.current_task, [])
        ids = set(self._own_took_part) - set(known if self.args.iso_schedule == "once" else ())
        if not ids or self.args.iso_schedule == "on_request" or self.args.sata_source == "fed_history":
            return
        for reply in clients.only(ids).call("isolated_update", self.isolated_message()):
            if isolated := reply.tensors("iso."):
                vectors = self.stored.setdefault(self.current_task, {})
                vectors[reply.client] = {n: v.to(self.device) for n, v in isolated.items()}
            known = sorted({*known, reply.client})
        self.isolating[self.current_task] = known

    def isolated_message(self) -> Message:
        """What a client needs to train iota."""
        return Message({"rows": self.rows}, keep={"rows": self.current_task}, isolated=True)

    @torch.no_grad()
    def merged(self, current, replies, weights):
        self._own_took_part = [r.client for r in replies]
        if self.args.sata_aggregate == "sum":
            weights = [1.0] * len(weights)
        steps = [{n: w * (r[n].to(p) - p.detach()) for n, p in current.items()} for r, w in zip(replies, weights)]
        for r, step in zip(replies, steps):
            self.sizes.setdefault(self.current_task, {})[r.client] = int(r["n_samples"])
            if self.args.sata_source == "fed_history":
                vectors = self.stored.setdefault(self.current_task, {})
                taus = {n.removeprefix("tau."): d for n, d in step.items()}
                vectors[r.client] = combined([vectors.get(r.client, self._own_lin.zeros()), taus], [1.0, 1.0])
        if self.args.sata_aggregate == "sum":
            return {n: p.detach() + sum(step[n] for step in steps) for n, p in current.items()}
        return super().merged(current, replies, weights)

    # ---------------------------------------------------------------- server: forgetting

    def unlearn(self, clients, who: Sequence[int]) -> None:
        """tau' of every task so far, from one message of each leaving client for each.

        The others are asked for nothing, but with ``--sata_lambda val`` how many images are right.
        """
        under_way = len(self.taus) == self.current_task  # the task's own vector is still in ``tau``
        vectors = [*self.taus, *([{n: p.detach().clone() for n, p in self.current_tau().items()}] if under_way else [])]
        taken: list[tuple[list[Vector], list[float]]] = []  # of each task: iota_u and p_u of those who leave
        for t in range(len(vectors)):
            of_task = clients.of_task(t)
            sizes = self.sizes.get(t, {})
            n = sum(sizes.values())
            leaving = [u for u in who if u in sizes]
            taken.append((self.isolated(of_task, leaving, t), [sizes[u] / n for u in leaving]))
            if self.args.sata_head and leaving and t in self.class_totals:
                gone = of_task.only(leaving).sum("class_sums", Message({}))
                sums, counts = self.class_totals[t]
                self.class_totals[t] = (sums - gone["sums"].to(sums), counts - gone["counts"].to(counts))
                self.write_rows(t)
        rule = self.args.sata_lambda
        same = self.best_lambda(clients, who, vectors, [i for iotas, _ in taken for i in iotas]) if rule == "val" else 1
        for t, (tau, (iotas, shares)) in enumerate(zip(vectors, taken)):
            lambdas = {"p": shares, "proj": [projection(tau, i) for i in iotas]}.get(rule, [same] * len(iotas))
            vectors[t] = removed(tau, iotas, lambdas, shares, self.args.sata_renorm)
        for n, p in self.current_tau().items() if under_way else ():
            p.data = vectors[-1][n].to(p)
        self.taus = vectors[: len(self.taus)]
        self._own_merged = None
        self.stored, self.sizes = (
            {t: {k: v for k, v in kept.items() if k not in who} for t, kept in known.items()}
            for known in (self.stored, self.sizes)
        )
        self.isolating = {t: [k for k in ids if k not in who] for t, ids in self.isolating.items()}

    def isolated(self, of_task, leaving: Sequence[int], task: int) -> list[Vector]:
        """iota_u of the leaving clients for a task, or what stands for it.

        Raises:
            RunError: a client has trained none, or does not answer and alone has it.
        """
        if not leaving:
            return []
        if self.args.sata_source == "fed_history":
            return [self.stored[task][u] for u in leaving]
        now = self.args.iso_schedule == "on_request"
        none = [] if now else [str(u) for u in leaving if u not in self.isolating.get(task, [])]
        if none:
            raise RunError(
                f"client {', '.join(none)} has trained no isolated vector in task {task}: it was lost whenever it was "
                "to; train with --iso_schedule on_request or --sata_source fed_history"
            )
        if self.args.iso_custody == "server":
            return [self.stored[task][u] for u in leaving]
        call, message = ("isolated_update", self.isolated_message()) if now else ("isolated_vector", Message({}))
        replies = of_task.only(leaving).call(call, message)
        lost = [str(u) for u in leaving if u not in [r.client for r in replies]]
        if lost:
            raise RunError(
                f"client {', '.join(lost)} cannot be reached, and its isolated vector is nowhere else: ask again when "
                "it can, or train with --iso_custody server or --sata_source fed_history"
            )
        return [{n: v.to(self.device) for n, v in r.tensors("iso.").items()} for r in replies]

    def best_lambda(self, clients, who, vectors: list[Vector], iotas: list[Vector]) -> float:
        """See the head of the file; without held-out images of the leaving clients, the largest lambda allowed."""
        if not self.args.alpha_share:
            raise UserError("--sata_lambda val chooses by images held out: give --alpha_share above 0")
        if not iotas:
            return 0.0
        out, tau = (combined(v, [1.0] * len(v)) for v in (iotas, vectors))
        message = Message(
            {**{f"0.{k}": v for k, v in out.items()}, **{f"1.{k}": v for k, v in tau.items()}, "rows": self.rows}
        )

        def accuracy(leaving: bool) -> Tensor:
            of_task = [clients.of_task(t) for t in range(len(vectors))]
            groups = [c.only(u for u in c.ids if (u in who) == leaving) for c in of_task]
            found = sum(g.sum("right_without", message)["right"] for g in groups if len(g))
            return found[:-1] / found[-1].clamp(min=1)

        control, forget = accuracy(False), accuracy(True)
        allowed = control >= KEPT * control[0]
        worst = torch.where(allowed, forget.cpu().to(control), torch.inf)
        best = int((worst == worst.min()).nonzero()[-1])  # of equally good ones the largest
        return GRID[best]

    # ---------------------------------------------------------------- client

    def isolated_update(self, message: Message, client) -> Message:
        """iota_k a step further: ``local_update`` from iota_k, and back to it.

        By the draws of ``local_update``: after one round both vectors are the same.
        """
        return self.local_update(message, client)

    def load(self, message: Message) -> None:
        if "isolated" not in message:  # every client starts from a vector of its own (start_training)
            super().load(message)

    def training_samples(self, client) -> Tensor:
        if client.call == "isolated_update":
            client.draw_as("local_update")
        return super().training_samples(client)

    @torch.no_grad()
    def start_at_isolated(self, client) -> None:
        """tau <- iota_k, 0 if there is none or it is trained at one go."""
        known = client.state.get("iso", {}).get(client.task) if self.args.iso_schedule == "every_round" else None
        for n, p in self.current_tau().items():
            p.copy_(known[n]) if known else p.zero_()

    def start_training(self) -> None:
        if self.client.call == "isolated_update":
            self.start_at_isolated(self.client)
        super().start_training()

    def local_epochs(self) -> int:
        """Those of all rounds together (or ``--iso_epochs``) for an iota that is trained at one go."""
        if self.client.call == "isolated_update" and self.args.iso_schedule != "every_round":
            return self.args.iso_epochs or super().local_epochs() * self.args.num_comm_rounds
        return super().local_epochs()

    def reply_of(self, client, loss: float) -> Message:
        if client.call != "isolated_update":
            return super().reply_of(client, loss)
        iota = {n: p.detach().cpu().clone() for n, p in self.current_tau().items()}
        client.state.setdefault("iso", {})[client.task] = iota
        leaves = self.args.iso_custody == "server" or self.args.iso_schedule == "on_request"
        return Message({f"iso.{n}": v for n, v in iota.items() if leaves})

    def isolated_vector(self, message: Message, client) -> Message:
        """iota_k."""
        return Message({f"iso.{n}": v for n, v in client.state["iso"][client.task].items()})

    def right_without(self, message: Message, client) -> Message:
        """Held-out images that are right among the task's classes at tau - lambda iota, for lambda in ``GRID``."""
        self.rows = message["rows"].to(self.device)
        out, tau = ({n: t.to(self.device) for n, t in message.tensors(f"{i}.").items()} for i in (0, 1))
        lo, hi = self.get_offsets(client.task)
        client.indices = self.kept(client)[1]
        found = torch.zeros(len(GRID) + 1, device=self.device)
        for x, y in client.stat_loader() if len(client.indices) else ():
            f = self.along(x, [out, tau])
            said = [(self.head_logits(f(-lam, 1.0), lo, hi).argmax(1) == y - lo).sum() for lam in GRID]
            found += torch.stack([*said, torch.tensor(len(y), device=self.device)])
        return Message({"right": found.cpu()})
