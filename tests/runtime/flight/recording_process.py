"""A process that records 500 ticks and 20 inferences a second until it is killed, for test_killed_recorder.py.

    python recording_process.py FOLDER WORDS

WORDS: a file of two int64 that it keeps up to date: when the first tick was put, 0 before, and the last.
"""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from onbeat.drivers.interfaces import Frame
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.flight.header import make_header
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.flight.messages import CHUNK
from onbeat.runtime.flight.recorder import Recorder
from onbeat.runtime.observation import Observation
from onbeat.runtime.record import TickRing, new_tick_ring, take_ticks
from onbeat.runtime.robots import build_robot, load_robot

SAMPLER = SamplerSpec(1, 1, "off", gate_lambda=0.0, gate_temperature=1.0, gate_directions=0)
SPEC = PolicySpec(2, 8, 1, 16, 1, trained_delay=0, sampler=SAMPLER)
VIEWS = ("top", "wrist")


def put_tick(ring: TickRing, k: int) -> int:
    """What the compiled loop does, for one that is not compiled; returns the tick's time."""
    t_ns, at = time.monotonic_ns(), k % len(ring.rows)
    ring.rows["number"][at], ring.due_ns[at] = k, t_ns
    ring.goal_rad[at] = k
    ring.written[0] = k + 1
    return t_ns


def inference(t_ns: int, number: int) -> Inference:
    """Of frames that tell its number."""
    frames = {view: Frame(number, t_ns, np.full((96, 96, 3), number % 256, np.uint8)) for view in VIEWS}
    chunk = dict.fromkeys((field.name for field in CHUNK), 0) | {"number": number, "published_ns": t_ns}
    return Inference(Observation(frames, {"arm": np.zeros(6)}, t_ns), "lift", chunk)


def main(folder: Path, words: np.ndarray) -> None:
    robot = build_robot(replace(load_robot("so101-twin").config, cameras=dict.fromkeys(VIEWS, "")))
    ring = new_tick_ring(len(robot.joints))
    recorder = Recorder(folder, make_header({}, robot, SPEC, mode="async"), budget_bytes=4_000_000)
    take_ticks(ring)  # loads what is compiled
    threading.Thread(target=recorder.run, args=(ring, threading.Event())).start()
    for k in range(10**9):
        t_ns = put_tick(ring, k)
        if k % 25 == 0:
            recorder.tell(inference(t_ns, k // 25))
        words[:] = words[0] or t_ns, t_ns
        time.sleep(0.002)


if __name__ == "__main__":
    main(Path(sys.argv[1]), np.memmap(sys.argv[2], np.int64, "r+"))
