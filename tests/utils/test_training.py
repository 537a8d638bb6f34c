"""The central training loop."""

from __future__ import annotations

import pytest

from models.sgd import Sgd
from tests.helpers import run, small_args


@pytest.mark.parametrize(
    "schedule, rates",
    [
        ("none", [0.1, 0.1, 0.1]),
        ("multisteplr --lr_milestones 1 2", [0.1, 0.01, 0.001]),
        ("cosine", [0.1, 0.075, 0.025]),
    ],
)
def test_the_schedule_begins_anew_with_every_task(tmp_path, monkeypatch, schedule, rates):
    seen = []

    def begin_epoch(self, epoch, dataset):
        seen.append(self.opt.param_groups[0]["lr"])

    monkeypatch.setattr(Sgd, "begin_epoch", begin_epoch)
    argv = [
        *small_args("sgd", False),
        "--n_epochs=3",
        "--lr=0.1",
        "--stop_after=2",
        "--optimizer=sgd",
        "--optim_mom=0.9",
    ]
    assert run([*argv, *f"--lr_scheduler={schedule}".split()], tmp_path) == 0
    assert seen == pytest.approx(rates * 2)
