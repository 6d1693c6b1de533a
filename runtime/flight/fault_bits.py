"""The bits of /tick's `faults` and `seen`: a log says in its header which fault each one is, for the table grows."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.faults import Fault

FIELDS: Final = ("faults", "seen")
NAMES: Final = [fault.name for fault in Fault]  # of the bits, from 0, in this version


def in_this_version(ticks: NDArray[np.void], header: Mapping[str, Any]) -> NDArray[np.void]:
    """The ticks of a log, (T,), with the bits where this version has them; a fault it does not know has none."""
    names = header.get("faults", NAMES)
    if names == NAMES:
        return ticks
    ticks = ticks.copy()
    for field in {*FIELDS} & {*(ticks.dtype.names or ())}:
        ticks[field] = _moved(ticks[field], names)
    return ticks


def _moved(bits: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.int64]:
    moved = np.zeros_like(bits)
    for bit, name in enumerate(names):
        if name in Fault.__members__:
            moved |= (bits >> bit & 1) << int(Fault[name])
    return moved
