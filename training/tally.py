"""What the steps since the last report came to, by robot and by task: losses, and how the routers chose.

L layers with experts, counted from the first that has them, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onbeat.training.objective import Answered
from onbeat.training.parallel import everyones


@dataclass(slots=True)
class Share:
    """Sums over the observations of one robot or task. observations: those routed; use: (L, E); entropy: in nats."""

    error: float = 0.0
    counted: float = 0.0
    observations: int = 0
    entropy: float = 0.0
    use: Tensor | None = None

    def add(self, other: "Share") -> None:
        """Count another's sums in."""
        self.error += other.error
        self.counted += other.counted
        self.observations += other.observations
        self.entropy += other.entropy
        if other.use is not None:
            self.use = other.use if self.use is None else self.use + other.use


class Tally:
    """Sums by label: a robot's name, and that name with the task. Of this process's observations until it is taken."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}

    def add(self, answers: Sequence[Answered]) -> None:
        """Count one step's answers in."""
        for answered in answers:
            self._add(answered)

    def take(self) -> dict[str, float]:
        """The means since the last call, by the names that TensorBoard shows. Of all processes, which must all call."""
        shares: dict[str, Share] = {}
        for own in everyones(self._shares):
            for label, share in own.items():
                shares.setdefault(label, Share()).add(share)
        self._shares = {}
        return {name: value for label, share in shares.items() for name, value in _means(label, share).items()}

    def _add(self, answered: Answered) -> None:
        errors, entries = answered.errors.flow.tolist(), answered.entries.flow.tolist()
        names = [pair for group in answered.groups for pair in zip(group.embodiments, group.tasks, strict=True)]
        entropy, use = _routes(answered)
        for row, (robot, task) in enumerate(names):
            own = Share(errors[row], entries[row])
            if row < len(entropy):
                own = Share(errors[row], entries[row], 1, entropy[row], use[row])
            for label in (robot, f"{robot}/{task}"):
                self._shares.setdefault(label, Share()).add(own)


def _routes(answered: Answered) -> tuple[list[float], Tensor]:
    """Of each observation that was routed: entropy, mean over layers, and use (B, L, E)."""
    if answered.routing is None:
        return [], torch.empty(0)
    return answered.routing.entropy.mean(0).tolist(), answered.routing.use.detach().cpu().transpose(0, 1)


def _means(label: str, share: Share) -> dict[str, float]:
    means = {f"flow/{label}": share.error / share.counted} if share.counted else {}
    if share.use is None:
        return means
    means[f"routing_entropy/{label}"] = share.entropy / share.observations
    for layer, row in enumerate((share.use / share.observations).tolist()):
        means |= {f"expert_use/{label}/layer{layer}/expert{expert}": part for expert, part in enumerate(row)}
    return means
