"""What the robot saw and felt at one time, checked against what its embodiment says it should."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.robot import StateKey
from onbeat.kernels.image import BadImage, check_image

VIDEO, STATE = "video.", "state."
SMALLEST_PX = 8  # each way; what a camera sends that has not started, or was set up wrong, is smaller


class ObservationError(OnbeatError):
    """An observation that the policy cannot take. No action follows from it."""


class MissingView(ObservationError):
    """A camera of the embodiment has no frame."""


class BadView(ObservationError):
    """A frame that is not (height, width, 3) uint8 RGB, or too small to be a picture."""


class MissingState(ObservationError):
    """A state key of the embodiment has no value."""


class BadState(ObservationError):
    """A state value of the wrong shape, or not finite."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One instant. views: a frame per camera name. state: an array (d,) per state key, in the robot's units.

    t_state_ns: monotonic clock, when the state was read. More views and keys than the embodiment names are ignored.
    """

    views: Mapping[str, Frame]
    state: Mapping[str, NDArray[np.floating[Any]]]
    t_state_ns: int

    @property
    def t_capture_ns(self) -> int:
        """The oldest stamp in it: what the policy knows is at least as new. Row 0 of its chunk is due then."""
        return min([self.t_state_ns, *(frame.t_capture_ns for frame in self.views.values())])


def observe_recorded(arrays: Mapping[str, NDArray[Any]]) -> Observation:
    """A recorded observation: "video.<view>" (1, height, width, 3) and "state.<key>" (1, d); every stamp is 0.

    Other keys are ignored. Raises ObservationError when the leading axis is not one observation.
    """
    single = {key: _only_row(key, rows) for key, rows in arrays.items() if key.startswith((VIDEO, STATE))}
    views = {key[len(VIDEO) :]: Frame(0, 0, rgb) for key, rgb in single.items() if key.startswith(VIDEO)}
    return Observation(views, {k[len(STATE) :]: v for k, v in single.items() if k.startswith(STATE)}, t_state_ns=0)


def select_observation(observation: Observation, views: Sequence[str], state: Sequence[StateKey]) -> Observation:
    """The observation with exactly these views and keys, in this order. Raises an ObservationError."""
    for name in views:
        _check_view(observation, name)
    for key in state:
        _check_state(observation, key)
    return replace(
        observation,
        views={name: observation.views[name] for name in views},
        state={key.name: observation.state[key.name] for key in state},
    )


def _only_row(key: str, rows: NDArray[Any]) -> NDArray[Any]:
    if rows.ndim == 0 or len(rows) != 1:
        raise ObservationError(f"'{key}' has shape {rows.shape}: give one observation with a leading axis of 1")
    return rows[0]


def _check_view(observation: Observation, name: str) -> None:
    if name not in observation.views:
        given = ", ".join(observation.views) or "none"
        raise MissingView(f"no frame of camera '{name}' (there are: {given}): connect it, or give the camera this name")
    try:
        check_image(observation.views[name].rgb)
    except BadImage as error:
        raise BadView(f"camera '{name}': {error}") from None
    height, width = observation.views[name].rgb.shape[:2]
    if min(height, width) < SMALLEST_PX:
        found = f"camera '{name}' shows {width} x {height} pixels"
        raise BadView(f"{found}: set it to {SMALLEST_PX} x {SMALLEST_PX} or more")


def _check_state(observation: Observation, key: StateKey) -> None:
    if key.name not in observation.state:
        given = ", ".join(observation.state) or "none"
        raise MissingState(f"no state '{key.name}' (there are: {given}): read it from the robot under this name")
    value = np.asarray(observation.state[key.name])
    if value.shape != (key.size,) or not np.issubdtype(value.dtype, np.floating):
        raise BadState(f"state '{key.name}' is {value.dtype} {value.shape}: give {key.size} floating-point numbers")
    if not np.isfinite(value).all():
        raise BadState(f"state '{key.name}' is not finite ({value}): check the sensor; nothing moves on such a reading")
