"""What recording and watching cost the loop: the rows of `onbeat bench loop` with the flight recorder and a view.

Four ways in turn, a slice each, round after round, so that what the machine does meanwhile falls on all of them: off,
off again (the same twice: how far it differs from itself is what no difference is), the recorder, recorder and view.
The recorder is the one of a run: its own thread, ticks of the loop, ten inferences a second with two frames of noise
each, which compress worst, files that are synced. The view is a process that saves what it is shown.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Frame
from onbeat.runtime.engine import PolicySpec
from onbeat.runtime.flight.header import make_header
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.flight.messages import CHUNK, packed
from onbeat.runtime.flight.reader import read_log
from onbeat.runtime.flight.recorder import Recorder
from onbeat.runtime.flight.view_pipe import ViewPipe
from onbeat.runtime.loop import ControlLoop
from onbeat.runtime.measures import figure, text_table
from onbeat.runtime.modes import ASYNC
from onbeat.runtime.observation import Observation
from onbeat.runtime.profile.machine import MachineSampler
from onbeat.runtime.profile.spread import Judgement, judge
from onbeat.runtime.record import TickRing, check_whole, take_ticks
from onbeat.runtime.robots import Robot, state_values

OFF, AGAIN, RECORDER, VIEW = "off", "off again", "recorder", "recorder and view"
WAYS: Final = (OFF, AGAIN, RECORDER, VIEW)
ROUNDS: Final = 4
PERIOD_S: Final = 0.1  # of inferences
PERCENTS: Final = (50.0, 99.0, 99.9)


@dataclass(slots=True)
class Samples:
    """Of one way, over all rounds. late_ns: of every tick. missed: deadlines. faulty: ticks whose exchange failed."""

    late_ns: list[NDArray[np.int64]] = field(default_factory=list)
    missed: int = 0
    faulty: int = 0

    def add(self, ticks: NDArray[np.void], loop: ControlLoop) -> None:
        """One slice: all the ticks of a loop that has ended."""
        self.late_ns.append(ticks["start_ns"] - ticks["due_ns"])
        self.missed += loop.status.missed
        self.faulty += loop.status.faulty_ticks

    @property
    def all_ns(self) -> NDArray[np.int64]:
        return np.concatenate(self.late_ns)


@dataclass(frozen=True, slots=True)
class Recording:
    """The recorder of a run beside a loop, in a folder. is_viewed: a view is shown everything."""

    robot: Robot
    spec: PolicySpec
    folder: Path
    is_viewed: bool

    @contextmanager
    def of(self, ring: TickRing) -> Iterator[None]:
        """While the block runs; the log is whole after it."""
        robot = replace(self.robot, config=replace(self.robot.config, cameras=dict.fromkeys(self._views, "")))
        sampler, stop = MachineSampler(()), threading.Event()
        header = make_header({}, robot, self.spec, mode=ASYNC, sampler=sampler)
        with ExitStack() as opened:
            view = ViewPipe(str(self.folder / "view.rrd"), header) if self.is_viewed else None
            watch = None if view is None else opened.enter_context(view).show
            recorder = opened.enter_context(Recorder(self.folder, header, sampler=sampler, watch=watch))
            told = self._inference(header["sizes"])
            threads = [
                threading.Thread(target=recorder.run, args=(ring, stop)),
                threading.Thread(target=tell, args=(recorder, told, stop)),
            ]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            recorder.finish(ring, {})

    @property
    def _views(self) -> Sequence[str]:
        return self.robot.embodiment.views

    def _inference(self, sizes: Mapping[str, int]) -> Inference:
        """One of this policy's size."""
        rng, side = np.random.default_rng(0), self.spec.image_size
        frames = {view: Frame(0, 0, rng.integers(0, 256, (side, side, 3), np.uint8)) for view in self._views}
        layout = packed(CHUNK, sizes)
        chunk: dict[str, Any] = {name: rng.random(layout[name].shape) for name in layout.names or ()}
        return Inference(Observation(frames, state_values(self.robot, np.zeros(sizes["J"])), 0), "sway", chunk)


def tell(recorder: Recorder, told: Inference, stop: threading.Event) -> None:
    """Ten inferences a second, each from frames of its own time."""
    while not stop.wait(PERIOD_S):
        now_ns = time.monotonic_ns()
        frames = {name: replace(frame, t_capture_ns=now_ns) for name, frame in told.observation.views.items()}
        seen = replace(told.observation, views=frames, t_state_ns=now_ns)
        recorder.tell(replace(told, observation=seen, chunk={**told.chunk, "published_ns": now_ns}))


def judge_costs(samples: Mapping[str, Samples]) -> dict[str, tuple[Judgement, ...]]:
    """Way -> each of PERCENTS against OFF, in us, judged by what AGAIN differs from it."""
    late_us = {way: found.all_ns / 1e3 for way, found in samples.items()}
    return {way: judge(late_us[OFF], late_us[way], PERCENTS, [late_us[AGAIN]]) for way in (RECORDER, VIEW)}


def costs_as_text(costs: Mapping[int, Mapping[str, Sequence[Judgement]]]) -> str:
    """A line per rate, way and percentile."""
    lines = [
        (f"{j.percent:g} %", str(rate_hz), way, *(figure(us, 1) for us in (j.a, j.b, j.spread)), j.verdict)
        for rate_hz, ways in costs.items()
        for way, judgements in ways.items()
        for j in judgements
    ]
    heads = ("lateness", "Hz", "with", "off, us", "with it, us", "A/A spread, us", "")
    return text_table(heads, lines)


def run_slice(way: str, loop: ControlLoop, run: Callable[[], None], recording: Recording) -> NDArray[np.void]:
    """The ticks of a loop that `run` runs to its end, with what the way says beside it. recording: else unused.

    Raises TicksLost.
    """
    if way in (OFF, AGAIN):
        run()
        return check_whole(take_ticks(loop.records), loop.status.ticks)
    with recording.of(loop.records):
        run()
    return check_whole(read_log(recording.folder).records("/tick"), loop.status.ticks)
