"""A robot as data: what it sees, what it reports, what it takes, and where each number sits in the unified space."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.normalisation import MODES
from onbeat.embodiment.rotation import ROTATION_SIZES

ABSOLUTE = "absolute"
DELTA_PER_STEP = "delta_per_step"
RELATIVE_TO_OBSERVATION = "relative_to_observation"
KINDS = (ABSOLUTE, DELTA_PER_STEP, RELATIVE_TO_OBSERVATION)
UNITS = ("rad", "m", "fraction", "command")
CLIENT_IMAGES = ("as_is", "rotate_180", "flip_vertical")


class EmbodimentError(OnbeatError):
    """An embodiment file that is wrong (the text names file, line and the closest right name), or none that fits."""


@dataclass(frozen=True, slots=True)
class StateKey:
    """One named part of the robot's report, at [start, stop) of the unified state.

    rotation: the form in which the robot gives it (see rotation.py), None for no rotation; in the unified state it is
    axis-angle. normalisation: a name of normalisation.MODES, or None. unit: of the robot's numbers, one of UNITS.
    """

    name: str
    start: int
    stop: int
    rotation: str | None = None
    normalisation: str | None = None
    unit: str = "command"

    @property
    def size(self) -> int:
        """How many numbers the robot gives."""
        return self.stop - self.start if self.rotation is None else ROTATION_SIZES[self.rotation]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one action key, a value per number of the key, in its unit; inf where there is none.

    lower, upper: of the value (rad for a joint). velocity: largest change per second. acceleration: per second squared.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ActionKey(StateKey):
    """One named part of a command, at [start, stop) of the unified action.

    kind: "absolute", "delta_per_step" (integrated to absolute before lookup) or "relative_to_observation" (re-encoded
    when a prefix moves to a newer observation). joints: a name per number, as the driver calls it; empty for no joints.
    client_scale, client_offset: what the published clients send is scale * value + offset; not applied by the policy.
    """

    kind: str = ABSOLUTE
    joints: tuple[str, ...] = ()
    limits: Limits | None = None
    client_scale: float = 1.0
    client_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Embodiment:
    """A robot in the terms of the unified space. Orders of views and keys are the network's and the driver's.

    policy_period_ms: time between two rows of a chunk. client_image: what the published client does to the simulator's
    images before the policy sees them. data_configs, datasets, tags: names under which published checkpoints know it.
    """

    name: str
    title: str
    policy_period_ms: float
    views: tuple[str, ...]
    state: tuple[StateKey, ...]
    action: tuple[ActionKey, ...]
    client_image: str = "as_is"
    data_configs: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    source: Path | None = field(default=None, compare=False)

    @property
    def policy_period_ns(self) -> int:
        return round(self.policy_period_ms * 1e6)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What a policy depends on: name, views, and keys without their limits."""
        return self.name, self.views, self.state, tuple(replace(key, limits=None) for key in self.action)

    @property
    def joints(self) -> tuple[str, ...]:
        """Joint names over all action keys, in the order of `flatten`."""
        return tuple(joint for key in self.action for joint in key.joints)

    @property
    def needs_statistics(self) -> bool:
        """Whether any key is normalised by numbers that come with the checkpoint."""
        return any(key.normalisation and MODES[key.normalisation].needs for key in (*self.state, *self.action))

    def flatten(self, actions: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Action values {key: (C, d)} side by side as (C, D) float64, in the order of the action keys."""
        return np.concatenate([np.asarray(actions[key.name], np.float64) for key in self.action], axis=-1)

    def split(self, rows: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """The inverse of `flatten`: (..., D) as {key: (..., d)}, views on `rows`."""
        stops = np.cumsum([key.size for key in self.action])
        return {key.name: rows[..., stop - key.size : stop] for key, stop in zip(self.action, stops, strict=True)}

    def limits(self) -> Limits:
        """Limits of all D action numbers in the order of `flatten`. Raises EmbodimentError for a key without limits."""
        missing = [key.name for key in self.action if key.limits is None]
        if missing:
            raise EmbodimentError(
                f"{self.source}: action '{missing[0]}' has no limits, and nothing moves without: add lower and upper"
            )
        known = [key.limits for key in self.action if key.limits is not None]
        return Limits(*(tuple(v for part in known for v in getattr(part, f.name)) for f in fields(Limits)))
