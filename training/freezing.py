"""What a run trains and what it leaves as it is: one table, by part of the network.

The optimiser holds nothing for a frozen part, and no bit of it changes. Of a part of which only active slots are
trained, the other slots have no gradient (the network masks them) and no weight decay: no bit of those changes either.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.slots import suggest
from onbeat.training.config import PolicyConfig
from onbeat.training.model.policy import Policy

Treatment = Literal["trained", "frozen", "active slots"]
TRAINED: Treatment = "trained"
FROZEN: Treatment = "frozen"
ACTIVE_SLOTS: Treatment = "active slots"

# Part -> how its parameters' names begin, the first match only. "foundation" is the action stream below the first layer
# that has experts; the network's config tells which layers those are.
PARTS = {
    "adapters": r"(\w+\.)*adapters?\b",
    "vision": r"vit_model\.",
    "connector": r"connector\.",
    "embedding": r"language_model\.embed_tokens\.",
    "understanding": r"language_model\.(layers\.\d+\.und|norm\.und)\.",
    "lm_head": r"language_model\.lm_head\.",
    "experts": r"language_model\.layers\.\d+\.gen\.experts\.",
    "routers": r"language_model\.layers\.\d+\.gen\.router\.",
    "action": r"language_model\.(layers\.(?P<layer>\d+)\.gen|norm\.gen)\.",
    "heads": r"(state_encoder|action_encoder|action_decoder)\.",
    "gate": r"mpg\.",
}
FOUNDATION = "foundation"
NAMES = (
    *("vision", "connector", "embedding", "understanding", "lm_head"),
    *(FOUNDATION, "action", "routers", "experts", "heads", "adapters", "gate"),
)
SLOTTED = ("adapters",)

PRESETS: Mapping[str, Mapping[str, Treatment]] = {
    "full": {},
    "freeze-vision": {"vision": FROZEN},
    "freeze-foundation": {FOUNDATION: FROZEN},
    "action-expert": dict.fromkeys(("vision", "connector", "embedding", "understanding", "lm_head"), FROZEN),
    "new-robot": {**dict.fromkeys(NAMES, FROZEN), "adapters": ACTIVE_SLOTS},
}


class FreezingError(OnbeatError):
    """A preset or part that does not exist, or a choice that trains nothing."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a recipe chooses. preset: a name of PRESETS. parts: by part, instead of what the preset says."""

    preset: str = "full"
    parts: Mapping[str, Treatment] = field(default_factory=dict)

    def treatment(self, part: str) -> Treatment:
        """What becomes of a part; parts that work by slots are trained in their active slots at most."""
        chosen = self.parts.get(part, PRESETS[self.preset].get(part, TRAINED))
        return ACTIVE_SLOTS if chosen == TRAINED and part in SLOTTED else chosen


@dataclass(frozen=True, slots=True)
class PartRow:
    """One line of the table. parameters: how many numbers the part has."""

    part: str
    treatment: Treatment
    parameters: int


def check_frozen(frozen: Frozen, where: str) -> None:
    """Raise FreezingError for a preset, part or treatment that does not exist."""
    if frozen.preset not in PRESETS:
        raise FreezingError(f"{where}: unknown preset '{frozen.preset}': {suggest(frozen.preset, PRESETS)}")
    for part, treatment in frozen.parts.items():
        if part not in NAMES:
            raise FreezingError(f"{where}.parts: unknown part '{part}': {suggest(part, NAMES)}")
        if treatment == ACTIVE_SLOTS and part not in SLOTTED:
            raise FreezingError(f"{where}.parts: {part} has no slots: give 'trained' or 'frozen'")


def part_of(name: str, config: PolicyConfig) -> str:
    """The part that a parameter belongs to."""
    for part, pattern in PARTS.items():
        match = re.match(pattern, name)
        if match and part == "action" and match["layer"] and _is_foundation(int(match["layer"]), config):
            return FOUNDATION
        if match:
            return part
    raise AssertionError(f"no part of the table has '{name}'")


def freeze(policy: Policy, frozen: Frozen) -> None:
    """Make every parameter trained or frozen. Raises FreezingError when nothing is left to train."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(frozen.treatment(part_of(name, policy.config)) != FROZEN)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise FreezingError(f"preset '{frozen.preset}' leaves nothing to train in this network: add what it trains")


def decays(name: str, parameter: nn.Parameter, config: PolicyConfig) -> bool:
    """Whether weight decay acts on a parameter: on matrices, but not on those of which some rows must not change."""
    return parameter.ndim >= 2 and part_of(name, config) not in SLOTTED


def freezing_table(policy: Policy, frozen: Frozen) -> list[PartRow]:
    """The parts that this network has, in the order of the table."""
    counts = dict.fromkeys(NAMES, 0)
    for name, parameter in policy.named_parameters():
        counts[part_of(name, policy.config)] += parameter.numel()
    return [PartRow(part, frozen.treatment(part), count) for part, count in counts.items() if count]


def _is_foundation(layer: int, config: PolicyConfig) -> bool:
    return config.decoder.experts is not None and not config.decoder.is_routed(layer)
