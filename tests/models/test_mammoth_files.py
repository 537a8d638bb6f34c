"""Method files as people wrote them for Mammoth run here as they are: central, federated, stopped and resumed."""

import os
import sys
from pathlib import Path

import pytest
import torch

import models
from utils import registry
from utils.args import parse_args
from utils.buffer import icarl_replay
from utils.errors import UserError
from utils.training import Session

FOLDER = Path(models.__file__).parent

ER_ACE = """
import torch

from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args, ArgumentParser
from utils.buffer import Buffer


class ErAce(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'task-il']

    @staticmethod
    def get_parser(parser) -> ArgumentParser:
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super(ErAce, self).__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(self.args.buffer_size)
        self.seen_so_far = torch.tensor([]).long().to(self.device)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        present = labels.unique()
        self.seen_so_far = torch.cat([self.seen_so_far, present]).unique()
        assert len(self.seen_so_far) <= self.n_seen_classes <= self.num_classes
        logits = self.net(inputs)
        mask = torch.zeros_like(logits)
        mask[:, present] = 1
        self.opt.zero_grad()
        if self.seen_so_far.max() < (self.num_classes - 1):
            mask[:, self.seen_so_far.max():] = 1
        if self.current_task > 0:
            logits = logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)
        loss = self.loss(logits, labels)
        if self.current_task > 0:
            buf_inputs, buf_labels = self.buffer.get_data(
                self.args.minibatch_size, transform=self.transform, device=self.device)
            loss = loss + self.loss(self.net(buf_inputs), buf_labels)
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels)
        return loss.item()
"""

OLD_PARSER = """
import torch
from utils.buffer import Buffer
from utils.args import *
from models.utils.continual_model import ContinualModel


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(description='Replay as it was written years ago.')
    add_management_args(parser)
    add_experiment_args(parser)
    add_rehearsal_args(parser)
    parser.add_argument('--penalty_weight', type=float, required=True, help='Penalty weight.')
    parser.set_defaults(lr=0.07)
    return parser


class OldEr(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'domain-il', 'task-il', 'general-continual']

    @staticmethod
    def get_parser() -> ArgumentParser:
        return get_parser()

    def __init__(self, backbone, loss, args, transform):
        super(OldEr, self).__init__(backbone, loss, args, transform)
        self.buffer = Buffer(self.args.buffer_size, self.device)
        self.current_task = 0
        self.ended = []

    def observe(self, inputs, labels, not_aug_inputs):
        real_batch_size = inputs.shape[0]
        self.opt.zero_grad()
        if not self.buffer.is_empty():
            buf_inputs, buf_labels = self.buffer.get_data(self.args.minibatch_size, transform=self.transform)
            inputs = torch.cat((inputs, buf_inputs))
            labels = torch.cat((labels, buf_labels))
        loss = self.loss(self.net(inputs), labels)
        loss = loss + self.args.penalty_weight * sum(p.square().sum() for p in self.net.parameters())
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels[:real_batch_size])
        return loss.item()

    def end_task(self, dataset):
        self.ended.append((self.current_task, self.args.lr))
        self.current_task += 1
"""

SI = """
import torch
import torch.nn as nn

from models.utils.continual_model import ContinualModel


class SynapticIntelligence(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'domain-il', 'task-il']

    @staticmethod
    def get_parser(parser):
        parser.add_argument('--c', type=float, default=0.5, help='strength')
        parser.add_argument('--xi', type=float, default=1.0, help='damping')
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.checkpoint = self.net.get_params().data.clone().to(self.device)
        self.big_omega = None
        self.small_omega = 0

    def penalty(self):
        if self.big_omega is None:
            return torch.tensor(0.0).to(self.device)
        return (self.big_omega * ((self.net.get_params() - self.checkpoint) ** 2)).sum()

    def end_task(self, dataset):
        if self.big_omega is None:
            self.big_omega = torch.zeros_like(self.net.get_params()).to(self.device)
        self.big_omega += self.small_omega / ((self.net.get_params().data - self.checkpoint) ** 2 + self.args.xi)
        self.checkpoint = self.net.get_params().data.clone().to(self.device)
        self.small_omega = 0

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.loss(self.net(inputs), labels) + self.args.c * self.penalty()
        loss.backward()
        nn.utils.clip_grad_value_(self.net.parameters(), 1)
        self.opt.step()
        self.small_omega += self.args.lr * self.net.get_grads().data ** 2
        return loss.item()
"""

AGEM = """
import numpy as np
import torch

from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer


def store(params, into, sizes):
    into.fill_(0.0)
    for i, p in enumerate(params()):
        if p.grad is not None:
            begin, end = sum(sizes[:i]), sum(sizes[:i + 1])
            into[begin:end].copy_(p.grad.data.view(-1))


def overwrite(params, vector, sizes):
    for i, p in enumerate(params()):
        if p.grad is not None:
            begin, end = sum(sizes[:i]), sum(sizes[:i + 1])
            p.grad.data.copy_(vector[begin:end].contiguous().view(p.grad.data.size()))


class AGem(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'domain-il', 'task-il']

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(self.args.buffer_size)
        self.grad_dims = [p.data.numel() for p in self.parameters()]
        self.grad_xy = torch.Tensor(np.sum(self.grad_dims)).to(self.device)
        self.grad_er = torch.Tensor(np.sum(self.grad_dims)).to(self.device)

    def end_task(self, dataset):
        per_task = self.args.buffer_size // dataset.N_TASKS
        loader = dataset.train_loader
        _, labels, images = next(iter(loader))[:3]
        self.buffer.add_data(examples=images.to(self.device)[:per_task], labels=labels.to(self.device)[:per_task])

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.zero_grad()
        loss = self.loss(self.net.forward(inputs), labels)
        loss.backward()
        if not self.buffer.is_empty():
            store(self.parameters, self.grad_xy, self.grad_dims)
            buf_inputs, buf_labels = self.buffer.get_data(
                self.args.minibatch_size, transform=self.transform, device=self.device)
            self.net.zero_grad()
            self.loss(self.net.forward(buf_inputs), buf_labels).backward()
            store(self.parameters, self.grad_er, self.grad_dims)
            dot = torch.dot(self.grad_xy, self.grad_er)
            if dot.item() < 0:
                flat = self.grad_xy - dot / torch.dot(self.grad_er, self.grad_er) * self.grad_er
            else:
                flat = self.grad_xy
            overwrite(self.parameters, flat, self.grad_dims)
            assert torch.equal(self.net.get_grads(), flat)
            self.net.set_grads(flat)
        self.opt.step()
        return loss.item()
"""

OLD_LWF = """
import torch
from torch.optim import SGD

from datasets import get_dataset
from models.utils.continual_model import ContinualModel
from utils.args import *


def smooth(logits, temp, dim):
    log = logits ** (1 / temp)
    return log / torch.sum(log, dim).unsqueeze(1)


class OldLwf(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'task-il']

    @staticmethod
    def get_parser():
        parser = ArgumentParser(description='Distillation, old style.')
        add_management_args(parser)
        add_experiment_args(parser)
        parser.add_argument('--softmax_temp', type=float, default=2)
        return parser

    def __init__(self, backbone, loss, args, transform):
        super(OldLwf, self).__init__(backbone, loss, args, transform)
        self.old_net = None
        self.soft = torch.nn.Softmax(dim=1)
        self.logsoft = torch.nn.LogSoftmax(dim=1)
        self.dataset = get_dataset(args)
        self.current_task = 0
        self.cpt = get_dataset(args).N_CLASSES_PER_TASK
        nc = get_dataset(args).N_TASKS * self.cpt
        self.eye = torch.tril(torch.ones((nc, nc))).bool().to(self.device)
        self.distilled = 0

    def begin_task(self, dataset):
        self.net.eval()
        if self.current_task > 0:
            opt = SGD(self.net.classifier.parameters(), lr=self.args.lr)
            for epoch in range(self.args.n_epochs):
                for i, data in enumerate(dataset.train_loader):
                    inputs, labels = data[0].to(self.device), data[1].to(self.device)
                    opt.zero_grad()
                    with torch.no_grad():
                        feats = self.net(inputs, returnt='features')
                    mask = self.eye[(self.current_task + 1) * self.cpt - 1] ^ self.eye[self.current_task * self.cpt - 1]
                    outputs = self.net.classifier(feats)[:, mask]
                    self.loss(outputs, labels - self.current_task * self.cpt).backward()
                    opt.step()
            logits = []
            with torch.no_grad():
                n = dataset.train_loader.dataset.data.shape[0]
                for i in range(0, n, self.args.batch_size):
                    inputs = torch.stack([dataset.train_loader.dataset.__getitem__(j)[2]
                                          for j in range(i, min(i + self.args.batch_size,
                                                                len(dataset.train_loader.dataset)))])
                    logits.append(self.net(inputs.to(self.device)).cpu())
            setattr(dataset.train_loader.dataset, 'logits', torch.cat(logits))
        self.net.train()
        self.current_task += 1

    def observe(self, inputs, labels, not_aug_inputs, logits=None, epoch=None):
        self.opt.zero_grad()
        outputs = self.net(inputs)
        mask = self.eye[self.current_task * self.cpt - 1]
        loss = self.loss(outputs[:, mask], labels)
        if logits is not None:
            mask = self.eye[(self.current_task - 1) * self.cpt - 1]
            q = smooth(self.soft(logits[:, mask]).to(self.device), self.args.softmax_temp, 1)
            p = smooth(self.soft(outputs[:, mask]), self.args.softmax_temp, 1)
            loss = loss - torch.sum(q * torch.log(p)) / q.shape[0]
            self.distilled += 1
        loss.backward()
        self.opt.step()
        return loss.item()
"""

GDUMB = """
import math

from torch.optim import SGD, lr_scheduler

from backbone import get_backbone
from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.augmentations import apply_transform
from utils.buffer import Buffer


def fit_buffer(self, epochs):
    opt = SGD(self.net.parameters(), lr=self.args.maxlr, momentum=self.args.optim_mom)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=1, T_mult=2, eta_min=self.args.minlr)
    for epoch in range(epochs):
        if epoch <= 0:
            for group in opt.param_groups:
                group['lr'] = self.args.maxlr * 0.1
        elif epoch == 1:
            for group in opt.param_groups:
                group['lr'] = self.args.maxlr
        else:
            scheduler.step()
        inputs, labels = self.buffer.get_all_data(transform=self.transform, device=self.device)
        while len(inputs):
            opt.zero_grad()
            loss = self.loss(self.net(inputs[:self.args.batch_size]), labels[:self.args.batch_size])
            inputs, labels = inputs[self.args.batch_size:], labels[self.args.batch_size:]
            loss.backward()
            opt.step()


class GDumb(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'task-il']

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        parser.add_argument('--maxlr', type=float, default=5e-2)
        parser.add_argument('--minlr', type=float, default=5e-4)
        parser.add_argument('--fitting_epochs', type=int, default=3)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super(GDumb, self).__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(self.args.buffer_size)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.buffer.add_data(examples=not_aug_inputs, labels=labels)
        return 0

    def end_task(self, dataset):
        self.net = get_backbone(self.args).to(self.device)
        fit_buffer(self, self.args.fitting_epochs)
"""

FDR = """
from copy import deepcopy

import torch
from torch import nn

from datasets import get_dataset
from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer


class Fdr(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'task-il']

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.benchmark = get_dataset(args)
        self.per_task = args.buffer_size // self.benchmark.N_TASKS
        assert self.dataset.NAME == self.benchmark.NAME and self.device == self.net.device
        self.buffer = Buffer(self.args.buffer_size)
        self.old_net = None
        self.spare = deepcopy(self.net)
        self.spare.load_state_dict(self.net.state_dict())
        self.spare_opt = torch.optim.SGD(self.spare.parameters(), lr=self.args.lr)
        self.soft = nn.Softmax(dim=1)

    def end_task(self, dataset):
        self.old_net = deepcopy(self.net)
        self.old_net.eval()
        with torch.no_grad():
            for i, (inputs, labels, not_aug) in enumerate(dataset.train_loader):
                outputs = self.net(inputs.to(self.device))
                self.buffer.add_data(examples=not_aug.to(self.device), logits=outputs.data,
                                     task_labels=torch.ones(len(labels)).long() * self.current_task)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.loss(self.net(inputs), labels)
        loss.backward()
        self.opt.step()
        if not self.buffer.is_empty():
            self.opt.zero_grad()
            buf_inputs, buf_logits, _ = self.buffer.get_data(
                self.args.minibatch_size, transform=self.transform, device=self.device)
            with torch.no_grad():
                teacher = self.soft(self.old_net(buf_inputs))
            distance = torch.norm(self.soft(self.net(buf_inputs)) - self.soft(buf_logits), 2, 1).mean()
            distance = distance + torch.norm(self.soft(self.net(buf_inputs)) - teacher, 2, 1).mean()
            distance.backward()
            self.opt.step()
        return loss.item()
"""

ICARL = """
import torch
import torch.nn.functional as F

from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.batch_norm import bn_track_stats
from utils.buffer import Buffer, fill_buffer, icarl_replay
from copy import deepcopy


class ICarl(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'task-il']

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(self.args.buffer_size)
        self.eye = torch.eye(self.num_classes).to(self.device)
        self.class_means = None
        self.old_net = None
        self.widths = []

    def forward(self, x):
        if self.class_means is None:
            with torch.no_grad():
                self.compute_class_means()
        feats = self.net(x, returnt='features')
        return -(self.class_means.unsqueeze(0) - feats.unsqueeze(1)).pow(2).sum(2)

    @torch.no_grad()
    def compute_class_means(self):
        transform = self.dataset.get_normalization_transform()
        examples, labels = self.buffer.get_all_data(transform, device=self.device)
        means = []
        for c in range(self.num_classes):
            mine = examples[labels == c]
            if len(mine):
                means.append(self.net(mine, returnt='features').mean(0))
            else:
                means.append(torch.full((self.net.feature_dim,), 1e3).to(self.device))
        self.class_means = torch.stack(means)

    def observe(self, inputs, labels, not_aug_inputs, logits=None, epoch=None):
        self.class_means = None
        if self.current_task > 0:
            with torch.no_grad():
                logits = torch.sigmoid(self.old_net(inputs))
        self.opt.zero_grad()
        pc = self.n_past_classes
        outputs = self.net(inputs)[:, :self.n_seen_classes]
        targets = self.eye[labels][:, :self.n_seen_classes]
        if self.current_task > 0:
            targets = torch.cat((logits[:, :pc], targets[:, pc:]), dim=1)
        loss = F.binary_cross_entropy_with_logits(outputs, targets)
        loss.backward()
        self.opt.step()
        return loss.item()

    def begin_task(self, dataset):
        icarl_replay(self, dataset)
        self.widths.append(len(dataset.train_loader.dataset.data))

    def end_task(self, dataset):
        self.old_net = deepcopy(self.net.eval())
        self.net.train()
        with torch.no_grad():
            fill_buffer(self.buffer, dataset, self.current_task, net={net}, use_herding=True)
        self.class_means = None
"""

GENERAL = """
import numpy as np
import torch
import torch.nn.functional as F

from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer, reservoir
from utils.conf import get_device


class General(ContinualModel):
    NAME = '{name}'
    COMPATIBILITY = ['class-il', 'domain-il', 'task-il', 'general-continual']

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.device = get_device()
        self.buffer = Buffer(self.args.buffer_size, self.device)
        self.hits = torch.zeros(self.args.buffer_size)
        self.scores = np.zeros(self.args.buffer_size)
        self.history = {}

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        outputs = self.net(inputs)
        loss = self.loss(outputs, labels)
        if not self.buffer.is_empty():
            index, buf_inputs, buf_labels, buf_logits, buf_tasks = self.buffer.get_data(
                self.args.minibatch_size, transform=self.transform, return_index=True)
            assert torch.equal(self.buffer.labels[index], buf_labels)
            assert torch.equal(self.buffer.task_labels[index], buf_tasks)
            assert torch.equal(self.transform(self.buffer.examples[index]), buf_inputs)
            self.hits[index] += 1
            losses = F.cross_entropy(self.net(buf_inputs), buf_labels, reduction='none')
            self.scores[index.numpy()] = losses.detach().numpy()
            loss = loss + losses.mean() + F.mse_loss(self.net(buf_inputs), buf_logits)
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels, logits=outputs.data,
                             task_labels=torch.full_like(labels, self.current_task))
        self.history.setdefault(self.current_task, []).append(int(loss > 0))
        return loss.item()
"""

FILES = {
    "er_ace": (ER_ACE, ""),
    "old_parser": (OLD_PARSER, "--penalty_weight 0.001"),
    "si": (SI, ""),
    "agem": (AGEM, ""),
    "old_lwf": (OLD_LWF, ""),
    "gdumb": (GDUMB, "--buffer_size 40"),
    "fdr": (FDR, "--buffer_size 60"),
    "icarl": (ICARL.replace("{net}", "self.net"), "--buffer_size 60"),
    "icarl_self": (ICARL.replace("{net}", "self"), "--buffer_size 60"),
    "general": (GENERAL, "--buffer_size 60"),
}


@pytest.fixture
def drop():
    """``drop('si')`` puts a method file into models/; it returns the flags that choose it."""
    files = []

    def put(name: str) -> str:
        text, flags = FILES[name]
        known = f"zz-test-{name.replace('_', '-')}-{os.getpid()}"
        file = FOLDER / f"{known.replace('-', '_')}.py"
        files.append(file)
        file.write_text(text.replace("{name}", known))
        registry.scan.cache_clear()
        return f"--model {known} {flags}"

    yield put
    for file in files:
        file.unlink(missing_ok=True)
        sys.modules.pop(f"models.{file.stem}", None)
        vars(models).pop(file.stem, None)
    registry.scan.cache_clear()


def bits(module):
    return [t.clone() for t in module.state_dict().values() if isinstance(t, torch.Tensor)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


FAST = "--n_epochs 2 --batch_size 16 --debug_mode 1 --savecheck task"
FL = "--fl --num_clients 3 --num_comm_rounds 2 --participation_rate 0.7 --partition_mode iid"
QUIET = pytest.mark.filterwarnings("ignore:.*averaged network")


@QUIET
@pytest.mark.parametrize("fl", [False, True], ids=["central", "fl"])
@pytest.mark.parametrize("name", FILES)
def test_runs_stops_and_resumes(rig, drop, name, fl):
    flags = f"{drop(name)} {FAST} {FL if fl else ''}"
    whole = rig(flags, rig.MLP)
    start = bits(whole.model.net)
    whole.run(stop_after=3)
    assert not same(start, bits(whole.model.net)) and all(t.isfinite().all() for t in bits(whole.model.net))
    rows = whole.session.results.class_il
    # GDumb's clients each draw a network of their own, whose mean is no network
    assert len(rows) == 3 and (rows[0][0] > 60 or (fl and name == "gdumb"))
    first = rig(flags, rig.MLP).run(stop_after=2)
    second = rig(flags, rig.MLP).run(checkpoint=first.record.checkpoint, stop_after=3)
    assert same(bits(whole.model.net), bits(second.model.net))
    assert [r[:3] for r in rows[2:]] == [r[:3] for r in second.session.results.class_il[2:]]


class Killed(Exception):
    pass


@QUIET
@pytest.mark.parametrize("fl", [False, True], ids=["central", "fl"])
@pytest.mark.parametrize("name", FILES)
def test_resumes_within_a_task(rig, drop, monkeypatch, name, fl):
    """Also what begin_task left behind, on the method or on the samples, is taken up again."""
    flags = f"{drop(name)} {FAST.replace('task', 'round')} {FL if fl else ''}"
    whole = rig(flags, rig.MLP).run(stop_after=2)
    part, save = rig(flags, rig.MLP), Session.save

    def stop(self):
        save(self)
        if self.cursor == {"task": 1, "step": 2 if fl else 1}:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Session, "save", stop)
        part.run(stop_after=2)
    second = rig(flags, rig.MLP).run(checkpoint=part.record.checkpoint, stop_after=2)
    assert same(bits(whole.model.net), bits(second.model.net))


# ---- what each of them asks for, beyond running


def test_er_ace_counts_classes(rig, drop):
    r = rig(f"{drop('er_ace')} {FAST}", rig.MLP).run(stop_after=2)
    assert r.model.seen_so_far.tolist() == [0, 1, 2, 3]


def test_old_parser(rig, drop):
    flags = drop("old_parser")
    r = rig(f"{flags} {FAST}", rig.MLP).run(stop_after=3)
    assert r.args.penalty_weight == 0.001 and r.args.lr == 0.07 and r.args.minibatch_size == 16
    assert r.model.ended == [(0, 0.07), (1, 0.07), (2, 0.07)]  # it counts the tasks itself
    assert r.model.n_seen_classes == 6 and r.model.dataset is r.dataset
    with pytest.raises(UserError, match="penalty_weight"):
        parse_args(f"{flags.replace('--penalty_weight 0.001', '')} --dataset seq-digits".split())


def test_agem_projects(rig, drop):
    """With a memory whose gradient is the opposite, nothing is left to do."""
    r = rig(f"{drop('agem')} {FAST} --lr 1", rig.MLP)
    r.dataset.get_data_loaders()
    r.model.meta_begin_task(r.dataset)
    x, y, raw = next(iter(r.dataset.train_loader))
    r.model.loss = lambda out, labels: out.sum() if labels[0] >= 0 else -out.sum()
    r.model.buffer.add_data(examples=raw, labels=torch.full_like(y, -1))
    before = bits(r.model.net)
    r.model.transform = lambda images: r.dataset.get_transform()(images)
    r.model.transform.batched = True
    r.model.args.minibatch_size = 16
    r.model.observe(x, y, raw)
    for a, b in zip(before, bits(r.model.net), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


def test_old_lwf_distils_every_later_batch(rig, drop):
    flags = drop("old_lwf")
    r = rig(f"{flags} {FAST}", rig.MLP).run(stop_after=3)
    assert r.model.distilled == 2 * 2 * 5
    assert r.dataset.train_loader.dataset.logits.shape == (len(r.dataset.task_indices(2)), 10)
    r = rig(f"{flags} {FAST} {FL}", rig.MLP).run(stop_after=2)
    assert sorted(s["method"]["attrs"]["distilled"] > 0 for s in r.states.values())[-1]


def test_gdumb_learns_from_its_buffer_alone(rig, drop):
    r = rig(f"{drop('gdumb')} {FAST} --fitting_epochs 20 --buffer_size 100", rig.MLP)
    net = r.model.net
    r.run(stop_after=2)
    assert r.model.net is not net and len(r.model.buffer) == 100
    assert min(r.session.results.class_il[1][:2]) > 60  # no forgetting: it starts anew from the buffer


def test_fdr_keeps_a_teacher(rig, drop):
    r = rig(f"{drop('fdr')} {FAST} {FL}", rig.MLP).run(stop_after=2)
    kept = [s["method"] for s in r.states.values() if s and s["method"]["modules"].get("old_net") is not None]
    assert kept and all(not k["modules"]["old_net"].training for k in kept)
    assert all(k["attrs"]["buffer"].used_attributes == ["examples", "logits", "task_labels"] for k in kept)
    # data sets that a method builds itself are not copied client by client
    assert len(kept) > 1 and all(k["attrs"]["benchmark"] is kept[0]["attrs"]["benchmark"] for k in kept)


@pytest.mark.parametrize("name", ["icarl", "icarl_self"])
def test_icarl_replays_and_herds(rig, drop, name):
    r = rig(f"{drop(name)} {FAST} --buffer_size 24", rig.MLP).run(stop_after=3)
    n = [len(r.dataset.task_indices(t)) for t in range(3)]
    assert r.model.widths == [n[0], n[1] + 24, n[2] + 24]
    labels, counts = r.model.buffer.labels[: len(r.model.buffer)].unique(return_counts=True)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] and counts.tolist() == [4] * 6
    assert min(r.session.results.class_il[2][:3]) > 30


@QUIET
def test_icarl_trains_on_old_and_new_samples(rig, drop):
    r = rig(f"{drop('icarl')} {FAST} --buffer_size 24", rig.MLP).run(stop_after=1)
    while r.dataset.c_task < 1:
        r.dataset.get_data_loaders()
    buffer, raw = r.model.buffer, r.dataset.train_images
    r.model.meta_begin_task(r.dataset)
    view = r.dataset.train_loader.dataset
    own = len(r.dataset.task_indices(1))
    assert torch.equal(view.data[:own], raw[r.dataset.task_indices(1)])
    assert torch.equal(view.data[own:].float() / 255, buffer.examples[: len(buffer)])
    assert view.targets[own:].tolist() == buffer.labels[: len(buffer)].tolist()
    image, label, not_aug = view[own]
    assert label == buffer.labels[0] and torch.equal(not_aug, buffer.examples[0])


def test_validation_split_of_the_replay(rig, drop):
    r = rig(f"{drop('icarl')} {FAST} --buffer_size 100", rig.MLP).run(stop_after=1)
    r.dataset.get_data_loaders()
    n = len(r.dataset.task_indices(1))
    icarl_replay(r.model, r.dataset, val_set_split=0.25)
    view, held = r.dataset.train_loader.dataset, r.model.val_loader.dataset
    old = int((torch.as_tensor(held.targets) < 2).sum())
    assert 10 < old < 45 and len(held) == 2 * old and len(view) == n + 100 - 2 * old
    batch = next(iter(r.model.val_loader))
    assert len(batch) == 2 and batch[0].shape[1:] == (1, 28, 28)
    together = torch.cat([view.data, held.data]).flatten(1).float().sum(1).sort()[0]
    everything = torch.cat([r.dataset.train_images[r.dataset.task_indices(1)], (r.model.buffer.examples * 255).byte()])
    assert torch.equal(together, everything.flatten(1).float().sum(1).sort()[0])


def test_general(rig, drop):
    r = rig(f"{drop('general')} {FAST}", rig.MLP).run(stop_after=2)
    assert r.model.history == {0: [1] * 10, 1: [1] * 10} and r.model.hits.sum() == 19 * 16
    assert r.model.scores.max() > 0 and set(r.model.buffer.task_labels.tolist()) == {0, 1}
