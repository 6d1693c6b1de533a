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
from typing import TYPE_CHECKING

import numpy as np

from onbeat.drivers.twin.frames import FrameWriter, RingReader
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
    options = parser.parse_args(argv)
    end_with_parent()
    stop = stop_on_signal()
    from onbeat.drivers.twin.world import VIEWS, World

    world = World(frame_size=(options.frame_size, options.frame_size))
    writers = {view: FrameWriter(f"{options.frames}-{view}", *world.frame_size) for view in VIEWS}
    try:
        draw_views(world, RingReader(options.snapshots), writers)
        print(json.dumps({"ready": True}), flush=True)
        draw_until(stop, round(1e9 / options.rate_hz), world, RingReader(options.snapshots), writers)
    except RenderUnavailable as fault:
        print(json.dumps({"error": str(fault)}), flush=True)
        return 1
    finally:
        world.close()
        for writer in writers.values():
            writer.close()
    return 0


def draw_until(
    stop: threading.Event, period_ns: int, world: "World", snapshots: RingReader, writers: dict[str, FrameWriter]
) -> None:
    """Draw on absolute deadlines; one that has passed is dropped."""
    next_ns = time.monotonic_ns()
    while not stop.is_set():
        draw_views(world, snapshots, writers)
        now_ns = time.monotonic_ns()
        next_ns += period_ns * max(1, -(-(now_ns - next_ns) // period_ns))
        stop.wait((next_ns - now_ns) * 1e-9)


def draw_views(world: "World", snapshots: RingReader, writers: dict[str, FrameWriter]) -> None:
    """Draw every view of the newest snapshot; its time is when the frames were captured."""
    snapshot = snapshots.latest()
    if snapshot is None:
        return
    world.set_qpos_snapshot(snapshot.payload.view(np.float64))
    for view, writer in writers.items():
        writer.publish(world.render(view), snapshot.t_ns)


if __name__ == "__main__":
    sys.exit(main())
