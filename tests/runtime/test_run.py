"""`onbeat run` end to end on the twin: what it refuses, what it leaves behind, and that nothing outlives it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from onbeat.calibration.joints import FACTORY, load_joints
from onbeat.drivers.feetech.device import FeetechBus
from onbeat.drivers.feetech.protocol import RAD_PER_STEP
from onbeat.drivers.twin.client import start_twin
from onbeat.drivers.twin.frames import SHARED_MEMORY, FrameWriter
from onbeat.drivers.twin.inject import UNPLUGGED, Injection, inject
from onbeat.drivers.twin.records import read_goals, read_torque
from onbeat.runtime.daemon import DaemonConfig
from onbeat.runtime.flight.reader import read_log
from onbeat.runtime.loop import ControlLoop, compile_ahead
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.realtime import prepare_loop
from onbeat.runtime.record import TickLog
from onbeat.runtime.robots import RobotError, apply_toml, as_json, from_json, load_robot
from onbeat.runtime.run import RunRefused, events_of, guardian_text, main, new_run_folder, parse, start_daemon
from onbeat.runtime.safety import onsets
from onbeat.runtime.tick import TickState, new_tick_state
from onbeat.runtime.timeline import publish

pytestmark = pytest.mark.alone

RATE_HZ = load_robot("so101-twin").config.loop_rate_hz
MOST_FAULTY = 0.05  # of the ticks: the twin's process may not get a processor within an exchange's time-out


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """The processes that tests start find the loop compiled: nobody waits for that inside a time-out."""
    compile_ahead(load_robot("so101-twin").limits)


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "ckpt_a1" / "checkpoint"
VIEWS = ("top", "wrist")
UNDER_THE_TABLE = np.array([0.0, 0.9, 0.6, 0.8, 0.0, 0.4])  # by 10 cm


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of random weights for the SO-101."""
    from onbeat.embodiment.metadata import MERGED, Statistics, measure, save_statistics
    from onbeat.export.bundling import Recipe, export_bundle
    from onbeat.runtime.language import PolicyLanguage
    from onbeat.training.random_checkpoint import write_random_checkpoint

    folder = tmp_path_factory.mktemp("random")
    robot = load_robot("so101-twin")
    write_random_checkpoint(folder / "checkpoint", seed=3, like=GOLDEN)
    for path in (folder / "checkpoint").glob("*_metadata.json"):
        path.unlink()
    bounds = robot.embodiment.split(0.3 * np.stack([robot.limits.q_min, robot.limits.q_max]))
    statistics = {name: measure(rows) for name, rows in bounds.items()}
    save_statistics(Statistics("random", MERGED, statistics, statistics), folder / "checkpoint")
    language = PolicyLanguage.from_folder(folder / "checkpoint", embodiment=robot.embodiment)
    return export_bundle(Recipe(folder / "checkpoint", "random", language), folder / "bundle").folder


@pytest.fixture
def relaxing(tmp_path: Path) -> Path:
    """A robot file that lets go at the end."""
    path = tmp_path / "relaxing.toml"
    path.write_text("on_exit = 'relax'\n")
    return path


def start_run(bundle: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    """`onbeat run` as a user starts it, in a process group of its own."""
    command = [sys.executable, "-c", "import sys; from onbeat.cli import main; sys.exit(main())", "run"]
    command += ["--bundle", str(bundle), "--out", str(out), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run_folder(out: Path) -> Path:
    return next(iter(out.iterdir()))


def wait_for_motion(process: "subprocess.Popen[str]", out: Path, goals: int = 100) -> None:
    """Return once that many goals have reached the twin."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        wires = list(out.glob("*/twin/wire.bin"))
        if wires and len(read_goals(wires[0].parent)) > goals:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no motion: {process.communicate()}")


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test after which a process or shared memory of Onbeat is there that was not before."""
    before = leftovers()
    yield
    deadline = time.monotonic() + 5
    while leftovers() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftovers() - before == set()


def leftovers() -> set[str]:
    """Processes of Onbeat that descend from this one, and rings whose process is gone."""
    mine = {f"{p.pid} {' '.join(p.cmdline())}" for p in psutil.process_iter() if is_ours(p)}
    return mine | {path.name for path in SHARED_MEMORY.glob("onbeat-*") if not is_owned(path.name)}


def is_ours(process: psutil.Process) -> bool:
    try:
        return "onbeat." in " ".join(process.cmdline()) and os.getpid() in [p.pid for p in process.parents()]
    except psutil.Error:
        return False


def is_owned(ring: str) -> bool:
    """Whether the process that a ring is named after lives: then it is another run's."""
    return psutil.pid_exists(int(ring.split("-")[1]))


class TestRefusals:
    """Before any process starts, and with the remedy."""

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--robot", "so101-twinn"], "did you mean 'so101-twin'"),
            (["--robot", "so101"], "give its port with --port"),
            (["--robot", "so101", "--port", "/dev/null"], "add --arm"),
            (["--robot", "so101", "--port", "/dev/null", "--arm"], "is no serial port"),
            (["--robot", "so101", "--port", "/dev/ttyNOPE", "--arm"], "is no serial port"),
            (["--seconds", "0"], "a time above 0"),
            (["--seconds", "nan"], "a time above 0"),
            (["--seconds", "inf"], "a time above 0"),
            (["--threads", "0"], "give 1 or more"),
            (["--log-budget-mb", "1"], "give 10 or more"),
            (["--log-budget-mb", "nan"], "give 10 or more"),
            (["--view", "run.mp4"], "ends in .rrd"),
            (["--bundle", "/nowhere"], "nowhere"),
        ],
    )
    def test_says_what_to_do(self, options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert main(["--out", str(tmp_path), *options]) == 1
        assert complaint in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_a_file_is_no_folder_for_runs(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(RunRefused, match="name another with --out"):
            new_run_folder(tmp_path / "file")

    def test_wrong_usage_is_code_two(self):
        with pytest.raises(SystemExit, match="2"):
            parse(["--speed", "11"])

    def test_help_shows_defaults_and_units(self, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit, match="0"):
            parse(["--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "of motion, s (default: 30.0)" in told
        assert "(default: )" not in told
        assert "(default: None)" not in told


class TestRobotFile:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("loop_rate = 50", "did you mean 'loop_rate_hz'"),
            ("name = 'mine'", "unknown field 'name'"),
            ("port = 3", "must be a str"),
            ("on_exit = 'drop'\n", "choose hold, relax, park"),
            ("v_max = [1.0]", "give 6, one per joint"),
            ("v_max = [0, 1, 1, 1, 1, 1]", "above 0 for every joint"),
            ("q_min = [0, 0, 0, 0, 0, 9]", "q_min below q_max"),
            ("loop_rate_hz = 5", "choose 10 to 1000"),
            ("loop_rate_hz = ", "is no TOML file"),
            ("embodiment = 'libero'", "is not joints"),
            ("[cameras.top]\nindex = 0\n", r"cameras.top = \{'index': 0\}: give the name of its ring"),
            ("cameras = 'top'\n", "must be a dict"),
            ("max_behind_rad = [0.1]\n", "for each of 6 joints"),
            ("max_behind_rad = [-0.1, 0, 0, 0, 0, 0]\n", "0 or more"),
        ],
    )
    def test_names_what_is_wrong(self, text: str, complaint: str, tmp_path: Path):
        path = tmp_path / "robot.toml"
        path.write_text(text)
        with pytest.raises(RobotError, match=complaint):
            load_robot("so101", path)

    def test_overrides_and_may_only_tighten_a_limit(self, tmp_path: Path):
        path = tmp_path / "robot.toml"
        path.write_text("loop_rate_hz = 50\nv_max = [1, 99, 99, 99, 99, 99]\ncameras = {top = 'ring'}\n")
        robot = load_robot("so101", path)
        assert robot.config.loop_rate_hz == 50.0
        assert robot.limits.v_max.tolist() == [1.0, 3.0, 3.0, 3.0, 3.0, 3.0]
        assert robot.config.cameras == {"top": "ring"}

    def test_survives_the_way_to_the_daemon(self, tmp_path: Path):
        path = tmp_path / "robot.toml"
        path.write_text("v_max = [1, 2, 3, 1, 2, 3]\n")
        config = apply_toml(load_robot("so101").config, path)
        assert from_json(json.loads(json.dumps(as_json(config)))) == config


class TestWhatIsTold:
    def test_a_librarys_line_is_no_event(self):
        lines = ["Loading...\n", "\n", "3\n", '["event"]\n', '{"level": 1}\n', '{"event": "done"}\n', '{"event": "do']
        assert list(events_of(lines)) == [{"event": "done"}]

    @pytest.mark.parametrize(
        ("event", "text"),
        [
            ({"did": "relax", "took_s": 0.1}, "RUNTIME_HUNG: the guardian took torque off"),
            ({"did": "hold", "why": "no way"}, "RUNTIME_HUNG: the guardian left the arm holding, no way"),
            ({"did": "part", "why": "gone"}, "RUNTIME_HUNG: the guardian lost the arm before it was done, gone"),
            ({"did": "nothing", "why": "gone"}, "RUNTIME_HUNG: the guardian could not reach the arm, gone"),
        ],
    )
    def test_what_the_guardian_did_in_words(self, event: dict[str, str], text: str):
        assert guardian_text({"fault": "RUNTIME_HUNG", **event}) == text


def start_loop(state: TickState, bus: FeetechBus) -> tuple[ControlLoop, threading.Thread, np.ndarray]:
    """A loop that ticks, its thread, and where the joints were (J,)."""
    loop = ControlLoop(state, bus, history=StateHistory(len(state.command_q)))
    bus.enable(True)
    loop.read_first()
    start = state.measured_q.copy()
    thread = threading.Thread(target=lambda: (prepare_loop(), loop.run()))
    thread.start()
    while loop.status.ticks == 0:
        time.sleep(0.01)
    return loop, thread, start


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
class TestScripted:
    """Twin, bus and loop, with chunks that a test writes."""

    def test_the_arm_follows_chunks_and_every_command_is_inside_the_limits(self, tmp_path: Path):
        robot = load_robot("so101-twin")
        joints = load_joints(FACTORY, robot.joints)
        with start_twin(tmp_path, seed=1, has_cameras=False) as twin, FeetechBus(twin.port, joints) as bus:
            state = new_tick_state(robot.limits, rate_hz=RATE_HZ, rows=16)
            log = TickLog()
            loop, thread, start = start_loop(state, bus)
            ends = [start + 0.3, start - 0.2, start + 0.1]
            for end in ends:
                now_ns = time.monotonic_ns()
                publish(
                    state.timeline,
                    np.linspace(state.command_q if np.isfinite(state.command_q).all() else start, end, 16),
                    t0_ns=now_ns,
                    period_ns=robot.policy_period_ns,
                    now_ns=now_ns,
                )
                time.sleep(1.0)
            loop.stop()
            thread.join()
        log.take(loop.records)
        ticks = log.records()
        goals = ticks["goal_rad"]
        speed = np.diff(goals, axis=0) * RATE_HZ
        assert len(goals) > 500
        assert goals[0].tolist() == start.tolist()
        assert (np.abs(speed) <= robot.limits.v_max * (1 + 1e-9)).all()
        assert (np.abs(np.diff(speed, axis=0)) <= robot.limits.a_max / RATE_HZ * (1 + 1e-9)).all()
        assert (goals[-1] == goals[-2]).all()
        moved = np.abs(ticks["position_rad"] - start).max(axis=0)
        assert (moved > 0.1).all()
        assert loop.status.faulty_ticks <= len(goals) * MOST_FAULTY
        on_the_wire = read_goals(tmp_path)["goal_steps"][-1]
        centre = np.array([joint.zero_steps for joint in joints.values()])
        assert np.abs((on_the_wire - centre) * RAD_PER_STEP - goals[-1]).max() <= RAD_PER_STEP

    @pytest.mark.parametrize(("max_load", "gives_up"), [(0.75, False), (1.0, True)])
    def test_an_arm_that_presses_on_the_table_gives_way_before_a_servo_gives_up(
        self, max_load: float, gives_up: bool, tmp_path: Path
    ):
        robot = load_robot("so101-twin")
        joints = load_joints(FACTORY, robot.joints)
        with start_twin(tmp_path, seed=1, has_cameras=False) as twin, FeetechBus(twin.port, joints) as bus:
            settings = replace(robot.safety, max_load=max_load, max_behind_rad=())
            state = new_tick_state(
                robot.limits, rate_hz=RATE_HZ, rows=16, workspace=robot.workspace(), settings=settings
            )
            loop, thread, start = start_loop(state, bus)
            way = np.linspace(start, UNDER_THE_TABLE, 16)
            for rows in (way, way[-1:].repeat(16, axis=0), way[-1:].repeat(16, axis=0)):
                now_ns = time.monotonic_ns()
                publish(state.timeline, rows, t0_ns=now_ns, period_ns=robot.policy_period_ns, now_ns=now_ns)
                time.sleep(1.6)
            loop.stop()
            thread.join()
        came = onsets(state.safety)
        assert (came["SERVO_LOAD"] > 0) is not gives_up, "what notices it"
        assert (came["SERVO_OVERLOAD"] > 0) is gives_up
        assert bool(read_torque(tmp_path)) is gives_up, "by the motors' currents"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
class TestRun:
    def test_drives_reports_and_keeps_to_its_half(self, bundle: Path, tmp_path: Path):
        seen = tmp_path.with_suffix(".rrd")
        run = start_run(bundle, tmp_path, "--seconds", "4", "--json", "--view", str(seen))
        out, err = run.communicate(timeout=90)
        assert run.returncode == 0, err
        printed, folder = json.loads(out), run_folder(tmp_path)
        assert printed == json.loads((folder / "report.json").read_text())
        assert (folder / "report.html").stat().st_size > 10_000
        log = read_log(folder)
        ticks, chunks, told = log.records("/tick"), log.records("/chunk"), log.outcome
        assert log.problems == ()
        assert told is not None
        assert (told["error"], told["dropped"]) == (None, {})
        assert 780 <= len(ticks) + told["status"]["missed"] <= 860
        assert len(chunks) >= 10
        assert set(ticks["chunk_id"]) - {-1} <= set(chunks["chunk_id"])
        assert set(chunks["observed_ns"]) == set(log.records("/observation")["t_ns"])
        stamps = {view: [t_ns for t_ns, _ in log.frames(view)] for view in VIEWS}
        assert all((np.diff(stamps[view]) > 0).all() for view in VIEWS)
        captured = log.records("/observation")["captured_ns"].T
        assert {view: set(t_ns) for view, t_ns in stamps.items()} == dict(
            zip(log.cameras, map(set, captured), strict=True)
        )
        assert len(read_goals(folder / "twin")) >= len(ticks["t_ns"])
        assert seen.stat().st_size > 100_000, "the view saved what it was shown"
        modules = set(told["modules"])
        assert "onnxruntime" in modules
        assert modules & {"mujoco", "rerun", "torch", "onnx", "OpenGL", "transformers"} == set()
        forbidden = ("onbeat.training", "onbeat.export", "onbeat.drivers.twin.world", "onbeat.drivers.twin.referee")
        assert [name for name in modules if name.startswith(forbidden)] == []

    def test_ctrl_c_brings_the_arm_to_rest_and_ends_everything(self, bundle: Path, tmp_path: Path):
        run = start_run(bundle, tmp_path, "--seconds", "60")
        wait_for_motion(run, tmp_path)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
        out, err = run.communicate(timeout=30)
        assert run.returncode == 0, err
        assert "loop rate" in out
        goals = read_goals(run_folder(tmp_path) / "twin")["goal_steps"].astype(int)
        assert (goals[-1] == goals[-2]).all()
        assert np.abs(np.diff(goals[-200:], n=2, axis=0)).max() <= 20.0 / RATE_HZ**2 / RAD_PER_STEP + 2

    def test_a_killed_daemon_leaves_the_arm_to_the_guardian(self, bundle: Path, tmp_path: Path, relaxing: Path):
        run = start_run(bundle, tmp_path / "out", "--seconds", "60", "--robot-file", str(relaxing))
        wait_for_motion(run, tmp_path / "out")
        daemons = [p for p in psutil.Process(run.pid).children() if "onbeat.runtime.daemon" in p.cmdline()]
        assert len(daemons) == 1
        daemons[0].kill()
        _, err = run.communicate(timeout=30)
        assert run.returncode == 1
        assert "the daemon ended with exit code -9" in err
        assert "RUNTIME_DEAD: the guardian took torque off" in err
        assert not any(read_torque(run_folder(tmp_path / "out") / "twin")[-1].holds)

    def test_a_pulled_cable_is_waited_for_and_the_arm_let_go(self, bundle: Path, tmp_path: Path, relaxing: Path):
        run = start_run(bundle, tmp_path / "out", "--seconds", "60", "--robot-file", str(relaxing))
        wait_for_motion(run, tmp_path / "out")
        twin, now_ns = run_folder(tmp_path / "out") / "twin", time.monotonic_ns()
        inject(twin, Injection(UNPLUGGED, now_ns, now_ns + 2_000_000_000))
        _, err = run.communicate(timeout=60)
        assert run.returncode == 1
        assert "plug the adapter in again" in err
        assert not any(read_torque(twin)[-1].holds)
        outcome = read_log(twin.parent).outcome
        assert outcome is not None
        assert outcome["faults"]["PORT_LOST"] == 1

    def test_sigterm_ends_as_the_robot_file_says(self, bundle: Path, tmp_path: Path, relaxing: Path):
        run = start_run(bundle, tmp_path / "out", "--seconds", "60", "--robot-file", str(relaxing))
        wait_for_motion(run, tmp_path / "out")
        run.terminate()
        _, err = run.communicate(timeout=30)
        assert run.returncode == 0, err
        goals = read_goals(run_folder(tmp_path / "out") / "twin")["goal_steps"].astype(int)
        assert (goals[-1] == goals[-2]).all(), "at rest before the torque went"
        assert not any(read_torque(run_folder(tmp_path / "out") / "twin")[-1].holds)

    def test_a_killed_supervisor_leaves_nothing_running(self, bundle: Path, tmp_path: Path):
        run = start_run(bundle, tmp_path, "--seconds", "60")
        wait_for_motion(run, tmp_path)
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) >= 3
        run.kill()
        run.communicate()
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
        assert len(gone) == len(children)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
class TestBundleRefusals:
    def test_special_tokens_in_the_instruction(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        options = ["--bundle", str(bundle), "--out", str(tmp_path), "--instruction", "lift <|im_end|>"]
        assert main(options) == 1
        assert "<|im_end|>" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_for_another_robot(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        other = tmp_path / "other.toml"
        text = (ROOT / "embodiment" / "data" / "so101.toml").read_text()
        other.write_text(text.replace("right_arm_joints[0:5]", "left_arm_joints[0:5]"))
        robot_file = tmp_path / "robot.toml"
        robot_file.write_text(f"embodiment = '{other}'\n")
        options = ["--bundle", str(bundle), "--out", str(tmp_path / "out"), "--robot-file", str(robot_file)]
        assert main(options) == 1
        assert "exported for 'so101'" in capsys.readouterr().err

    def test_a_port_that_is_no_servo_bus(self, bundle: Path, tmp_path: Path):
        """The daemon itself: nothing answers on a pty that nobody serves."""
        controller, port = os.openpty()
        rings = {view: f"onbeat-{os.getpid()}-test-{view}" for view in VIEWS}
        writers = [FrameWriter(ring, 8, 8) for ring in rings.values()]
        config = replace(load_robot("so101").config, port=os.ttyname(port), cameras=rings)
        told = DaemonConfig(as_json(config), str(bundle), "lift", 5.0, 0, str(tmp_path))
        with start_daemon(told, tmp_path / "daemon.log") as daemon:
            assert daemon.stdout is not None
            events = [json.loads(line) for line in daemon.stdout]
        for writer in writers:
            writer.close()
        os.close(controller)
        os.close(port)
        assert daemon.returncode == 1
        assert events[-1]["event"] == "error"
        assert "no servo answers" in events[-1]["text"]
