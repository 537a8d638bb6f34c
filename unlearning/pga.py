"""PGA: projected gradient ascent of the leaving client (Halimi et al. 2022, arXiv 2207.05521).

    theta_ref = (sum_k theta_k less the client's) / (K - 1)
    max_theta  L(theta; D_u)   subject to   |theta - theta_ref| <= delta

K theta less the client's last model stands for the others' models. The client climbs from theta_ref by SGD, is put back
onto the ball after every step and stops once it is far from what it had last. delta is a third of the mean squared
distance from theta_ref to networks with random weights, as in the authors' notebook; over pretrained weights such
networks are far from everything, so with ``--pga_radius start``, the default, the distance to where the task began
takes its place. Rounds of the others (--recover_rounds) belong to the method: the ascent leaves a model that is of no
use. The authors' notebook makes ten.
"""

from __future__ import annotations

import torch

from federated.message import Message
from models.utils.unlearner import Unlearner
from utils.args import number
from utils.unlearning_metrics import distance


class PGA(Unlearner):
    NAME = "pga"
    NEEDS_HISTORY = True
    ON_TASK_VECTORS = False
    TRAINING = (*Unlearner.TRAINING, "ascend")

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--pga_lr", type=number(float, 0), default=0.01, help="rate of the ascent")
        add("--pga_epochs", type=number(int, 1), default=5, help="its epochs, at most")
        add("--pga_clip", type=number(float, 0, open_low=True), default=5.0, help="largest norm of its gradient")
        add("--pga_stop", type=number(float, 0), default=2.2, help="squared distance from its last model that ends it")
        add("--pga_radius", choices=("start", "random"), default="start", help="what delta is measured by")
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        for u in [u for u in who if u in clients.ids]:
            last = [(r, k) for r, k in self.rounds_of(self.current_task) if u in k["updates"]]
            if not last:
                continue
            kept, K = last[-1][1], len(clients)
            theta = self.trained()
            own = {n: (kept["start"][n] + d).to(theta[n]) for n, d in kept["updates"][u].items()}
            ref = {n: (K * t - own[n]) / max(K - 1, 1) for n, t in theta.items()}
            start = self.rounds_of(self.current_task)[0][1]["start"]
            if self.args.pga_radius == "start":
                radius = distance(ref, start)
            else:
                far = [distance(ref, {n: t.std() * torch.randn_like(t) for n, t in ref.items()}) for _ in range(10)]
                radius = (sum(f**2 for f in far) / len(far) / 3) ** 0.5
            entries = {**{f"ref.{n}": t for n, t in ref.items()}, **{f"own.{n}": t for n, t in own.items()}}
            self.set_trained(ref)
            message = Message({**self.broadcast(), **entries}, radius=radius)
            (reply,) = clients.only([u]).call("ascend", message)
            self.set_trained({n: reply[n] for n in theta})

    def ascend(self, message: Message, client) -> Message:
        """Client half: away from its own data, within the ball around the reference."""
        self.begin_turn(message, client)
        trained, a = self._own_turn.trained, self.args
        ref, own = ({n: t.to(self.device) for n, t in message.tensors(p).items()} for p in ("ref.", "own."))
        opt = torch.optim.SGD(list(trained.values()), lr=a.pga_lr, momentum=0.9)
        loader, done = client.train_loader(), False
        for _ in range(a.pga_epochs):
            for i, (inputs, labels, _plain) in enumerate(loader):
                if done or (a.debug_mode and i >= self.get_debug_iters()):
                    break
                opt.zero_grad()
                (-self.local_loss(inputs, labels, client).mean()).backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), a.pga_clip)
                opt.step()
                with torch.no_grad():
                    mine = {n: trained[n].detach() for n in ref}
                    far = distance(mine, ref)
                    if far > message["radius"]:
                        for n, t in mine.items():
                            trained[n].data = ref[n] + (t - ref[n]) * (message["radius"] / far)
                    mine = {n: trained[n].detach() for n in ref}
                    done = distance(mine, own) ** 2 > a.pga_stop
        return Message(dict(trained)).clone()
