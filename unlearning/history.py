"""Subtraction of history: past rounds are added up again without the client's updates.

    theta' = theta + sum_t [ sum_{k not in U} p_k / (1 - p_U) D_k,t - sum_k p_k D_k,t ]

Exact where there was one round; later updates of the others were made on top of the leaving client's, which stays in
them. No client is asked for anything.
"""

from __future__ import annotations

import torch

from models.utils.unlearner import Unlearner


class History(Unlearner):
    NAME = "history"
    NEEDS_HISTORY = True

    def unlearn(self, clients, who: list[int]) -> None:
        for t in range(self.current_task + 1):
            change: dict[str, torch.Tensor] = {}
            for _, kept in self.rounds_of(t):
                p = kept["weights"]
                gone = sum(p[u] for u in who if u in p)
                for k, update in kept["updates"].items():
                    if gone > 1 - 1e-9:  # a round of theirs alone: nothing else was learnt in it
                        factor = -p[k]
                    else:
                        factor = -p[k] if k in who else p[k] / (1 - gone) - p[k]
                    for n, d in update.items():
                        change[n] = change.get(n, 0) + factor * d
            self.move(t, change)

    def move(self, task: int, change: dict[str, torch.Tensor]) -> None:
        """Add to what a task has trained; the rows of an earlier task are in the classifier by now."""
        mine = self.trained()
        if task < self.current_task:
            lo, hi = self.get_offsets(task)
            for n in [n for n in change if n.startswith("head.")]:
                whole = getattr(self.net.classifier, n.removeprefix("head."))
                moved = whole.data.clone()
                moved[lo:hi] += change.pop(n).to(moved)
                whole.data = moved
        self.set_trained({n: mine[n] + d.to(mine[n]) for n, d in change.items() if n in mine})
