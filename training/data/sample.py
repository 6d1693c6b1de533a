"""What training sees of data, whatever robot, hand or text it came from: one sample, and where samples come from.

V views, S image side, C chunk rows, A = 200 unified slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.prompt import Prompt

Kind = Literal["human", "robot", "simulation", "vision_language"]
KINDS: tuple[Kind, ...] = ("human", "robot", "simulation", "vision_language")
MARKS = ("contact", "release")  # events of which a frame may carry one or both


@dataclass(frozen=True, slots=True)
class Sample:
    """One observation and what follows it, in the network's terms.

    frames: (V, 3, S, S) uint8 RGB; V may be 0. state: (A,) float32, normalised, 0 in slots that are not the robot's.
    actions: (C, A) float32, normalised; row 0 is due at the observation; rows past the end of the episode repeat its
    last. valid: (C, A) bool, what a loss may count: the robot's action slots, in rows inside the episode (and in the
    repeated ones where the source says that the robot stays there); all False for text alone.
    prompt: the whole prefix; its length differs between robots. embodiment, task: names, for logs and for routing.
    marks: the share of the chunk's rows that lie at an event of that name, by name. text: token ids (N,) int64 that the
    understanding stream is to answer with, None where it is asked nothing. extra: more numbers of the frame by column
    name, for auxiliary losses in training.
    """

    frames: NDArray[np.uint8]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    valid: NDArray[np.bool_]
    prompt: Prompt
    embodiment: str
    task: str
    kind: Kind
    marks: Mapping[str, float] = field(default_factory=dict)
    text: NDArray[np.int64] | None = None
    extra: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class Source(Protocol):
    """A set of samples of one robot (or hand, or of text), addressed by number. Safe to read from several threads."""

    @property
    def name(self) -> str:
        """As the plan and the logs call it."""
        ...

    @property
    def embodiment(self) -> str:
        """The robot's name; that of the text for vision-language."""
        ...

    @property
    def kind(self) -> Kind:
        """Which share of the mixture it is counted in."""
        ...

    @property
    def weights(self) -> NDArray[np.float64]:
        """(N,) how often each sample comes, beside the others of this source: above 0, larger near events."""
        ...

    def __len__(self) -> int:
        """How many samples: one per frame."""
        ...

    def sample(self, index: int, generator: np.random.Generator) -> Sample:
        """Sample `index`, from 0. generator: for what the source draws, such as one of several instructions."""
        ...


class Draw(NamedTuple):
    """One sample of a mixture: the number of its source, and the number of the sample in it."""

    source: int
    sample: int
