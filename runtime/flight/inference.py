"""One inference, as the inference thread tells it to the log."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onbeat.runtime.observation import Observation


@dataclass(frozen=True, slots=True)
class Inference:
    """What it began from and what came of it. chunk: the fields of /chunk by name. warning: of its delay, or ""."""

    observation: Observation
    instruction: str
    chunk: Mapping[str, Any]
    warning: str = ""
