
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
    NAME = 'zz-test-old-parser-13642'
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
