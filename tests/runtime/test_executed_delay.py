"""The d of a report is what the robot executed: by the inference thread, from the loop's ticks, and on the wire."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onbeat.calibration.joints import FACTORY, load_joints
from onbeat.drivers.feetech.device import FeetechBus
from onbeat.drivers.interfaces import Frame
from onbeat.drivers.twin.client import start_twin
from onbeat.drivers.twin.records import read_goals
from onbeat.runtime.chunker import Chunker
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.loop import ControlLoop, compile_ahead
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.record import TickLog
from onbeat.runtime.robots import Robot, build_robot, load_robot
from onbeat.runtime.run_records import RunRecords, read_chunks, read_ticks
from onbeat.runtime.scheduler import Scheduler
from onbeat.runtime.summary import executed_delays
from onbeat.runtime.tick import new_tick_state

pytestmark = pytest.mark.alone

ROWS, JOINTS = 16, 6
SECONDS = 12.0
STEP_RAD = 0.06  # between two chunks: many servo steps, and over within a policy period
PAN = 0
MOST_BETWEEN_NS = 30_000_000  # of two goals, which leave every 10 ms; a policy step is 100 ms


class LiveCamera:
    """A frame every 100 ms."""

    name = "top"

    def latest(self) -> Frame:
        t_ns = time.monotonic_ns() // 100_000_000 * 100_000_000
        return Frame(t_ns // 100_000_000, t_ns, np.zeros((8, 8, 3), np.uint8))

    def close(self) -> None: ...


class SlowPolicy:
    """Chunk n holds the pan joint at one of two places, in turn; its inference sleeps for a random time first."""

    def __init__(self, robot: Robot) -> None:
        self.robot, self.count, self.rng = robot, 0, np.random.default_rng(3)
        self.spec = SimpleNamespace(chunk=ROWS, trained_delay=0, guidance=False)
        self.language = None
        self.start = np.zeros(JOINTS)

    def infer(self, observation, instruction, **told) -> PolicyOutput:  # noqa: ARG002
        time.sleep(self.rng.uniform(0.12, 0.43))
        rows = np.tile(self.start, (ROWS, 1))
        rows[:, PAN] += STEP_RAD * (self.count % 2)
        self.count += 1
        none = np.zeros((0, 0), np.float32)
        return PolicyOutput(none, self.robot.embodiment.split(rows), none, none, StageTimes(0, 0, 0), none, None)


@pytest.mark.slow
def test_the_delay_in_the_report_is_the_one_that_the_twin_saw(tmp_path: Path) -> None:
    twin = load_robot("so101-twin")
    robot = build_robot(replace(twin.config, blend_steps=0))
    compile_ahead(robot.limits)
    policy, ticks, told = SlowPolicy(robot), TickLog(), list[Inference]()
    state, history = new_tick_state(robot.limits, rate_hz=100, rows=ROWS), StateHistory(JOINTS)
    chunker = Chunker(policy, robot, state.timeline)  # pyright: ignore[reportArgumentType]
    joints = load_joints(FACTORY, robot.joints)
    with start_twin(tmp_path, seed=1, has_cameras=False) as twin_bus, FeetechBus(twin_bus.port, joints) as bus:
        loop = ControlLoop(state, bus, history=history)
        scheduler = Scheduler(chunker, cameras=[LiveCamera()], history=history, log=told.append, instruction="sway")
        bus.enable(True)
        loop.read_first()
        policy.start = state.measured_q.copy()
        stop = threading.Event()
        threads = [threading.Thread(target=loop.run), threading.Thread(target=scheduler.run, args=(stop,))]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS)
        stop.set()
        loop.stop()
        for thread in threads:
            thread.join()
        ticks.take(loop.records)
    run = RunRecords(
        header={},
        joints=robot.joints,
        policy_period_ns=robot.policy_period_ns,
        ticks=read_ticks(ticks.records()),
        missed_ticks=0,
        chunks=read_chunks(inference.chunk for inference in told),
        faults={},
        truth=None,
        pictures={},
    )
    reported, seen = executed_delays(run), delays_on_the_wire(tmp_path, run)
    compared = {chunk: delay for chunk, delay in reported.items() if chunk in seen}
    assert len(compared) >= 8
    assert compared == {chunk: seen[chunk] for chunk in compared}
    assert len(set(compared.values())) >= 3, "the injected latency gives delays of several lengths"
    counted = {inference.chunk["chunk_id"]: inference.chunk["executed"] for inference in told}
    assert compared == {chunk: counted[chunk] for chunk in compared}, "budget and CHUNK_LATE mean the same"
    planned = {chunk.chunk_id: chunk.budget for chunk in run.chunks}
    late = sum(compared[chunk] > planned[chunk] for chunk in compared if chunk > 5)
    assert late <= len(compared) / 5, "the budget covers what follows"


def delays_on_the_wire(folder: Path, run: RunRecords) -> dict[int, int]:
    """Chunk -> policy steps from its observation until goals on the wire left where the chunk before held the joint.

    Only chunks that followed a joint at rest are counted: there the first goal that differs tells the moment. And only
    where goals came without a gap: what a busy machine holds up reaches the wire a policy step after it was due.
    """
    goals = read_goals(folder)
    t_ns, pan = goals["t_ns"], goals["goal_steps"][:, PAN].astype(int)
    leaves_ns = t_ns[1:][(np.diff(pan) != 0) & (np.abs(pan[1:] - np.roll(pan, 5)[1:]) <= 2)]
    gaps_ns = t_ns[1:][np.diff(t_ns) > MOST_BETWEEN_NS]
    found: dict[int, int] = {}
    for chunk in run.chunks:
        if chunk.chunk_id < 1:
            continue
        ends_ns = chunk.published_ns + 2 * run.policy_period_ns
        after = leaves_ns[(leaves_ns > chunk.published_ns) & (leaves_ns < ends_ns)]
        if len(after) and not ((gaps_ns > chunk.observed_ns) & (gaps_ns < ends_ns)).any():
            found[chunk.chunk_id] = int(after[0] - chunk.observed_ns) // run.policy_period_ns + 1
    return found
