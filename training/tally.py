"""What the steps since the last report came to, by robot and by task: losses, and how the routers chose.

L layers with experts, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onbeat.training.objective import Answered


@dataclass(slots=True)
class Share:
    """Sums over the observations of one robot or task. use: (L, E); entropy: in nats, mean over layers."""

    error: float = 0.0
    counted: float = 0.0
    observations: int = 0
    entropy: float = 0.0
    use: Tensor | None = field(default=None)


class Tally:
    """Sums by label: a robot's name, and that name with the task. Of this process's observations alone."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}

    def add(self, answers: Sequence[Answered]) -> None:
        """Count one step's answers in."""
        for answered in answers:
            self._add_group(answered)

    def take(self) -> dict[str, float]:
        """The means since the last call, by the names that TensorBoard shows."""
        shares, self._shares = self._shares, {}
        return {name: value for label, share in shares.items() for name, value in _means(label, share).items()}

    def _add_group(self, answered: Answered) -> None:
        group, task = answered.asked.group, answered.asked.task
        errors = answered.errors.flow.detach().tolist()
        counted = task.counted.flatten(1).sum(1).tolist()
        for row, (robot, name) in enumerate(zip(group.embodiments, group.tasks, strict=True)):
            for label in (robot, f"{robot}/{name}"):
                share = self._shares.setdefault(label, Share())
                share.error += errors[row]
                share.counted += counted[row]
                share.observations += 1
                _add_routing(share, answered, row)


def _add_routing(share: Share, answered: Answered, row: int) -> None:
    if answered.routing is None:
        return
    share.entropy += float(answered.routing.entropy[:, row].mean())
    use = answered.routing.use[:, row].detach().cpu()
    share.use = use if share.use is None else share.use + use


def _means(label: str, share: Share) -> dict[str, float]:
    means = {f"flow/{label}": share.error / share.counted} if share.counted else {}
    if share.use is None:
        return means
    means[f"routing_entropy/{label}"] = share.entropy / share.observations
    for layer, row in enumerate(torch.atleast_2d(share.use / share.observations).tolist()):
        means |= {f"expert_use/{label}/layer{layer}/expert{expert}": part for expert, part in enumerate(row)}
    return means
