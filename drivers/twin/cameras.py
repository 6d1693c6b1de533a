"""The twin's camera process: takes snapshots of the world, draws them at a fixed rate, publishes frames.

A process of its own, so that drawing never holds up the servo bus. Started by `serve.py`; prints one line of JSON when
its first frames are out, or what went wrong.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.frames import FrameWriter, RingReader, Stamped
from onbeat.drivers.twin.inject import (
    CAMERA_BLANK,
    CAMERA_FROZEN,
    CAMERA_STOPPED,
    CLOCK_JUMPED,
    CLOCK_STALLED,
    JUMP_NS,
    Injector,
)
from onbeat.drivers.twin.lifeline import end_with_parent, stop_on_signal
from onbeat.drivers.twin.render import RenderUnavailable

if TYPE_CHECKING:
    from onbeat.drivers.twin.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Draw until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.drivers.twin.cameras", description=__doc__)
    parser.add_argument("--snapshots", required=True, help="ring of world snapshots")
    parser.add_argument("--frames", required=True, help="prefix of the rings to publish, one per view")
    parser.add_argument("--frame-size", type=int, default=112, help="pixels (default %(default)s)")
    parser.add_argument("--rate-hz", type=float, default=10.0, help="default %(default)s")
    parser.add_argument("--injections", type=Path, required=True, help="folder of the file that asks for faults")
    options = parser.parse_args(argv)
    end_with_parent()
    stop = stop_on_signal()
    from onbeat.drivers.twin.world import VIEWS, World

    world = World(frame_size=(options.frame_size, options.frame_size))
    writers = {view: FrameWriter(f"{options.frames}-{view}", *world.frame_size) for view in VIEWS}
    lens = FaultyLens(world, Injector(options.injections))
    try:
        draw_views(lens, RingReader(options.snapshots), writers)
        print(json.dumps({"ready": True}), flush=True)
        draw_until(stop, round(1e9 / options.rate_hz), lens, RingReader(options.snapshots), writers)
    except RenderUnavailable as fault:
        print(json.dumps({"error": str(fault)}), flush=True)
        return 1
    finally:
        world.close()
        for writer in writers.values():
            writer.close()
    return 0


def draw_until(
    stop: threading.Event, period_ns: int, lens: "FaultyLens", snapshots: RingReader, writers: dict[str, FrameWriter]
) -> None:
    """Draw on absolute deadlines; one that has passed is dropped."""
    next_ns = time.monotonic_ns()
    while not stop.is_set():
        draw_views(lens, snapshots, writers)
        now_ns = time.monotonic_ns()
        next_ns += period_ns * max(1, -(-(now_ns - next_ns) // period_ns))
        stop.wait((next_ns - now_ns) * 1e-9)


def draw_views(lens: "FaultyLens", snapshots: RingReader, writers: dict[str, FrameWriter]) -> None:
    """Draw every view of the newest snapshot; its time is when the frames were captured."""
    snapshot = snapshots.latest()
    if snapshot is None:
        return
    lens.aim(snapshot)
    for view, writer in writers.items():
        frame = lens.frame(view)
        if frame is not None:
            writer.publish(frame, lens.t_ns)


class FaultyLens:
    """Pictures of a world and their time, or what the injector says in their place."""

    def __init__(self, world: "World", injector: Injector) -> None:
        self._world, self._injector = world, injector
        self._last: dict[str, NDArray[np.uint8]] = {}
        self.t_ns = 0

    def aim(self, snapshot: Stamped) -> None:
        """Take a world's snapshot and its time: the last again when the clock stalls, a later one when it jumped."""
        present = self._injector.look(time.monotonic_ns())
        self._world.set_qpos_snapshot(snapshot.payload.view(np.float64))
        if CLOCK_STALLED not in present:
            self.t_ns = snapshot.t_ns + (JUMP_NS if CLOCK_JUMPED in present else 0)

    def frame(self, view: str) -> NDArray[np.uint8] | None:
        """(height, width, 3) uint8, or None when no frame is to come."""
        present = self._injector.present
        if CAMERA_STOPPED in present:
            return None
        if CAMERA_FROZEN in present and view in self._last:
            return self._last[view]
        self._last[view] = self._world.render(view)
        return np.zeros_like(self._last[view]) if CAMERA_BLANK in present else self._last[view]


if __name__ == "__main__":
    sys.exit(main())
