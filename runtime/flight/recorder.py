"""The flight recorder: takes what happens, and writes it from a thread of its own. Whoever tells it never waits.

    loop       ─▶ tick ring ──┐
    inference  ─▶ queue ──────┼─▶ records thread, 10 Hz: encode ─▶ MCAP file ─▶ synced twice a second
    machine    ─▶ sampled ────┘

What does not fit into ring or queue is dropped and counted; a disk that takes nothing any more ends the log, is told
as `error` and, through the fault table, ends the run.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.runtime.engine import PolicySpec
from onbeat.runtime.faults import Fault, Level, fault_names
from onbeat.runtime.flight.encoding import PNG, Encoded, compress, encode_frame, encode_rows
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.flight.messages import CAMERA
from onbeat.runtime.flight.writer import DEFAULT_BUDGET_BYTES, LogWriter
from onbeat.runtime.profile.machine import MachineSampler
from onbeat.runtime.record import TickRing, take_ticks

DRAIN_PERIOD_S: Final = 0.1  # of the loop's ticks, of which its ring holds seconds
SYNC_PERIOD_NS: Final = 400_000_000  # with a drain more, and the disk's time, what a power cut takes is under a second
MOST_WAITING: Final = 32  # inferences: three seconds of them, some 60 MB with two large cameras


def sizes_of(spec: PolicySpec, *, joints: int, views: int, threads: int = 0, probes: int = 0) -> dict[str, int]:
    """What the letters of messages.LETTERS are in a run of this policy."""
    sampler = spec.sampler
    has_directions = sampler.gate == "directions"
    return {
        "J": joints,
        "V": views,
        "C": spec.chunk,
        "A": UNIFIED_DIM,
        "I": sampler.iterations,
        "K": sampler.iterations - 1,
        "T": sampler.flow_steps,
        "M": sampler.gate_directions if has_directions else 0,
        "H": spec.understanding_width if has_directions else 0,
        "N": threads,
        "P": probes,
    }


class Recorder:
    """Writes one log. `tell` is for the inference thread, `run` for the recorder's own, `finish` comes after both.

    error: why nothing is written any more, or "". dropped: topic -> messages that were not written.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        *,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        form: str = PNG,
        sampler: MachineSampler | None = None,
        watch: Callable[[Encoded], None] | None = None,
    ) -> None:
        """header: of /header. form: of frames, PNG or JPEG. sampler: of the machine, where it is to be looked at.

        watch: is told every message too, and must not block. Raises OSError when the folder takes no file.
        """
        self.folder, self.error = folder, ""
        self.dropped: Counter[str] = Counter()
        self._log = LogWriter(folder, header, budget_bytes=budget_bytes)
        self._cameras, self._form, self._watch, self._sampler = tuple(header["cameras"]), form, watch, sampler
        self._told: deque[Inference] = deque()
        self._turn = threading.Lock()  # of `keep`: at the end, another thread does what is left
        self._synced_ns = time.monotonic_ns()
        self._last_frame_ns: dict[str, int] = {}
        self._faults, self._level = 0, int(Level.OK)
        self._said = {"instruction": "", "warning": ""}
        compress(np.zeros((1, 1, 3), np.uint8), form)  # the first of all loads what the others need: up to a second

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exc: object) -> None:
        self._log.close()

    def tell(self, inference: Inference) -> None:
        """From the inference thread: keep this, when there is room. Returns at once."""
        if len(self._told) >= MOST_WAITING:
            self.dropped["/chunk"] += 1
        else:
            self._told.append(inference)

    def run(self, ring: TickRing, stop: threading.Event) -> None:
        """Until `stop`."""
        while not stop.wait(DRAIN_PERIOD_S):
            self.keep(ring)

    def keep(self, ring: TickRing) -> None:
        """Write what has come since."""
        with self._turn:
            self._write(self._ticks(take_ticks(ring)))
            while self._told:
                self._write(self._inference(self._told.popleft()))
            if time.monotonic_ns() - self._synced_ns >= SYNC_PERIOD_NS:
                self._write(self._machine())
                self._attempt(self._log.sync)
                self._synced_ns = time.monotonic_ns()

    def finish(self, ring: TickRing, outcome: Mapping[str, Any]) -> None:
        """Write what is left, /outcome, and the file's end. outcome: its fields but `t_ns` and `dropped`."""
        self.keep(ring)
        self.dropped["/tick"] += int(ring.dropped[0])
        t_ns = time.monotonic_ns()
        dropped = {topic: count for topic, count in self.dropped.items() if count}
        self._write([self._json("/outcome", {"t_ns": t_ns, **outcome, "dropped": dropped}, t_ns)])
        self._attempt(self._log.close)

    def _write(self, messages: Iterator[Encoded] | list[Encoded]) -> None:
        for item in messages:
            if self._watch is not None:
                self._watch(item)
            if self.error:
                self.dropped[item.topic] += 1
            else:
                self._attempt(lambda item=item: self._log.write(*item[:3], sequence=item.sequence))

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do something with the disk. What it refuses ends the log where it was whole; the run is told by `error`."""
        if self.error:
            return
        try:
            act()
        except OSError as error:
            self.error = error.strerror or str(error)
            self._log.abandon()

    def _ticks(self, ticks: NDArray[np.void]) -> Iterator[Encoded]:
        for due_ns, message in zip(ticks["due_ns"].tolist(), encode_rows(ticks), strict=True):
            yield Encoded("/tick", message, due_ns)
        yield from self._faults_of(ticks)

    def _faults_of(self, ticks: NDArray[np.void]) -> Iterator[Encoded]:
        """An event where faults or the level of a tick are not those of the one before."""
        faults = np.concatenate([[self._faults], ticks["faults"]])
        levels = np.concatenate([[self._level], ticks["level"]])
        for k in np.flatnonzero((np.diff(faults) != 0) | (np.diff(levels) != 0)).tolist():
            t_ns = int(ticks["due_ns"][k])
            for name, event in fault_changes(int(faults[k]), int(faults[k + 1])):
                yield self._event(t_ns, event, name)
            if levels[k] != levels[k + 1]:
                yield self._event(t_ns, "level", Level(int(levels[k + 1])).name)
        self._faults, self._level = int(faults[-1]), int(levels[-1])

    def _machine(self) -> Iterator[Encoded]:
        if self._sampler is not None:
            sample = self._sampler.sample()
            yield Encoded("/machine", self._log.encode("/machine", sample._asdict()), sample.t_ns)

    def _event(self, t_ns: int, event: str, name: str) -> Encoded:
        return self._json("/event", {"t_ns": t_ns, "event": event, "name": name}, t_ns)

    def _json(self, topic: str, values: Mapping[str, Any], t_ns: int) -> Encoded:
        return Encoded(topic, self._log.encode(topic, values), t_ns)

    def _inference(self, told: Inference) -> Iterator[Encoded]:
        """Frames first, so that what a reader finds of an inference is whole."""
        observed = told.observation
        for camera in self._cameras:
            frame = observed.views[camera]
            if self._last_frame_ns.get(camera) != frame.t_capture_ns:
                self._last_frame_ns[camera] = frame.t_capture_ns
                message = encode_frame(frame.rgb, frame.t_capture_ns, camera, self._form)
                yield Encoded(CAMERA + camera, message, frame.t_capture_ns, frame.sequence)
        seen = {
            "t_ns": observed.t_capture_ns,
            "captured_ns": [observed.views[camera].t_capture_ns for camera in self._cameras],
            "position_rad": np.concatenate(list(observed.state.values())),
            "instruction": told.instruction,
        }
        yield Encoded("/observation", self._log.encode("/observation", seen), observed.t_capture_ns)
        published_ns = int(told.chunk["published_ns"])
        yield Encoded("/chunk", self._log.encode("/chunk", told.chunk), published_ns)
        for event, text in (("instruction", told.instruction), ("warning", told.warning)):
            if text != self._said[event]:
                self._said[event] = text
                yield self._event(published_ns, event, text)


def fault_changes(before: int, after: int) -> Iterator[tuple[str, str]]:
    """(name, "fault" or "fault_cleared") of every bit that changed."""
    for name in fault_names(before ^ after):
        yield name, "fault" if after >> Fault[name] & 1 else "fault_cleared"
