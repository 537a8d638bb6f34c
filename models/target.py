"""TARGET, exemplar-free distillation (Zhang et al. 2023, arXiv 2303.06937), after its released code.

    task 0    L = CE(f(x)_new, y)                                   FedAvg over the whole network
    task t    L = CE(f(x)_new, y) + kd_weight * KD                  one batch of synthetic images s for one of real ones
    KD        = -mean_s sum_{j old} q_j log p_j,   p, q = softmax(f(s)_old / T), softmax(f_{t-1}(s)_old / T), T = 2

The images are made by the server after each task but the last, from its own network f_{t-1} and nothing else
(models/utils/data_free.py); only those of the latest task are kept. They travel as uint8, once to each client and task.

What the teacher says of them travels along, as logits, where clients see the images as the server did: the teacher is
fixed, so that is exact and no second network travels. Where clients augment them, as the released code does with the
data set's own augmentation (``--syn_aug 1``), the teacher has to see each view, and f_{t-1} travels instead, once too.

Different from the released code: synthetic images are repeated for as long as a client has real ones, where that ended
the epoch with whichever of the two ran out; they are rounded, not cut off, to 256 levels, and no files are written. Its
CIFAR-100 preset (``--model_config public``) makes ten batches with a warm-up of twenty, so the student is never
trained and the adversarial term never used; the default makes forty. The losses over the task's own classes and the
draws of real images are FedAvg's: with ``--kd_weight 0`` so is the run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from datasets.utils.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, send, to_float
from federated.message import Message
from models.utils.data_free import Synthesizer, add_synthesis_args, endless
from models.utils.distillation import distillation
from models.utils.federated_model import FederatedModel, share_backbone
from utils.args import add_switch, number
from utils.conf import make_generator
from utils.errors import UserError


class Replay:
    """Synthetic batches for one client's turn, as many as it asks for.

    Args:
        images: uint8 (n, C, H, W). transform: (float images, generator) -> inputs.
        logits: (n, C_old), what the teacher says of them; or None, and ``teacher`` is asked.
        generator: CPU generator of the order and the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        transform: Callable,
        batch_size: int,
        generator: torch.Generator,
        logits: Tensor | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.images, self.transform, self.generator = images, transform, generator
        self.logits, self.teacher = logits, teacher
        self.positions = endless(len(images), batch_size, generator)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs (B, C, H, W) and the teacher's logits of them (B, C_old or more)."""
        at = send(next(self.positions), self.images.device)
        inputs = self.transform(to_float(self.images[at]), self.generator)
        if self.logits is not None:
            return inputs, self.logits[at]
        with torch.no_grad():
            return inputs, self.teacher(inputs)


class Target(FederatedModel):
    """FedAvg with distillation on images that the server makes from its own network."""

    NAME = "target"
    COMPATIBILITY = ["class-il", "task-il"]
    FEDERATED_ONLY = True
    PER_SAMPLE_LOSS = False  # two batches in one loss

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--kd_weight", "--kd", "--kd_alpha", type=number(float, 0), default=25.0, help="weight of KD; 0: FedAvg")
        add("--softmax_temp", type=number(float, 0, open_low=True), default=2.0, help="temperature T of KD")
        add("--syn_batch_size", type=number(int, 1), default=None, help="synthetic images a step; --batch_size")
        add_switch(
            parser,
            "--syn_aug",
            default=1,
            help="augment synthetic images like real ones: where the data set has augmentation, the teacher travels",
        )
        add_synthesis_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        start, end = self.get_offsets(0)
        if not args.target_last_class and end - start < 2:
            raise UserError(
                "--target_last_class 0 leaves no class to draw after a first task of one class: leave it at 1"
            )
        self.kept: dict[str, Tensor] = {}  # what clients download once: images, with logits or the teacher's tensors

    # ---------------------------------------------------------------- server

    def end_rounds(self, clients) -> None:
        """Images from the network as it is, for the next task."""
        if self.args.kd_weight == 0 or self.current_task + 1 >= self.n_tasks:
            return
        images, _ = self.synthesizer().run()
        self.kept = {"syn.images": images}
        if self.augments:
            known = {**self.trainable(), **self.shared_buffers()}
            self.kept |= {f"teacher.{n}": t.detach().clone() for n, t in known.items()}
        else:
            self.kept["syn.logits"] = self.logits_of(images)

    def synthesizer(self) -> Synthesizer:
        """The synthesis from the network as it is, ready to run."""
        args, seen = Namespace(**vars(self.args)), self.n_seen_classes
        if args.debug_mode:
            for name in ("syn_round", "g_steps", "kd_steps"):
                setattr(args, name, min(getattr(args, name), self.get_debug_iters()))
            args.warmup = min(args.warmup, 1)
        moves = [RandomCrop(self.dataset.SIZE, args.gen_crop)] if args.gen_crop else []
        moves += [RandomHorizontalFlip()] if args.gen_flip else []
        return Synthesizer(
            self.net,
            self.dataset.SIZE,
            self.dataset.CHANNELS,
            columns=seen if args.syn_columns == "seen" else self.N_CLASSES,
            n_targets=seen if args.target_last_class else seen - 1,
            view=Compose([*moves, self.normalization_transform]),
            train_view=self.client_view,
            settings=args,
        )

    @torch.no_grad()
    def logits_of(self, images: Tensor) -> Tensor:
        """What the network, in evaluation, says of uint8 images (n, C, H, W) about the classes so far, (n, C_seen)."""
        training = self.net.training
        self.net.eval()
        said = [
            self.net(self.normalization_transform(to_float(x)))[:, : self.n_seen_classes] for x in images.split(256)
        ]
        self.net.train(training)
        return torch.cat(said)

    def broadcast(self) -> Message:
        """FedAvg's; images, and what the teacher says of them or the teacher, travel once per client and task."""
        return Message({**super().broadcast(), **self.kept}, keep=dict.fromkeys(self.kept, self.current_task))

    # ---------------------------------------------------------------- client

    @property
    def client_view(self) -> Callable:
        """How clients turn synthetic images into inputs."""
        return self.dataset.get_transform() if self.augments else self.normalization_transform

    @property
    def augments(self) -> bool:
        """Whether clients augment synthetic images."""
        transforms = self.dataset.get_transform().transforms
        return bool(self.args.syn_aug) and not all(isinstance(t, Normalize) for t in transforms)

    def before_local(self, message: Message, client) -> None:
        """Ready the synthetic images; their order has a generator of its own, so real ones come as in FedAvg."""
        self._own_replay = None
        if "syn.images" not in message:
            return
        logits, teacher = message.get("syn.logits"), None
        if logits is None:
            teacher = share_backbone(self.net).eval().requires_grad_(False)
            own = dict(teacher.state_dict(keep_vars=True))
            for name, t in message.tensors("teacher.").items():
                own[name].data = t.to(self.device)  # never written
        self._own_replay = Replay(
            message["syn.images"].to(self.device),
            self.client_view,
            self.args.syn_batch_size or self.args.batch_size,
            make_generator(client.seed, "synthetic"),
            logits if logits is None else logits.to(self.device),
            teacher,
        )

    def local_loss(self, inputs, labels, client) -> Tensor:
        """CE over the task's columns plus ``kd_weight`` times KD over the columns before them, a scalar."""
        loss = super().local_loss(inputs, labels, client).mean()
        if self._own_replay is None:
            return loss
        images, said = self._own_replay.next()
        old = slice(0, self.n_past_classes)
        kd = distillation(self.net(images)[:, old], said[:, old], self.args.softmax_temp)
        return loss + self.args.kd_weight * kd
