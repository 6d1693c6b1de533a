"""Evaluation judged by the world: what lifts the cube counts, what does not does not, and the clock is simulated."""

import functools
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from onbeat.drivers.feetech.protocol import RAD_PER_STEP
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime import evaluate as command
from onbeat.runtime.bundle import NotABundle
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.episode import BLANK, OTHER, Conditions, Episode, Outcome, Scene, in_servo_steps, run_episode
from onbeat.runtime.evaluate import CONTROLS, Evaluation, as_json, as_text, evaluate
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import RobotError, load_robot, state_values
from onbeat.runtime.timeline import EXPIRED

pytest.importorskip("mujoco")

ROBOT = load_robot("so101-twin")
PERIOD_NS = ROBOT.policy_period_ns
CHUNK = 12
SEED = 100_000
CONDITIONS = Conditions("lift the red cube")
NONE = np.zeros((0, 0), np.float32)
SPEC = PolicySpec(
    views=2,
    image_size=56,
    tokens_per_view=4,
    chunk=CHUNK,
    understanding_width=8,
    trained_delay=0,
    sampler=SamplerSpec(1, 1, "off", 0.0, 1.0, 1),
)


@dataclass
class Scripted:
    """A policy that says what `targets(t_ns)` says, (J,) rad, and keeps what it was shown."""

    targets: object
    spec: PolicySpec = SPEC
    language: object = None
    seen: list = field(default_factory=list)
    noises: list = field(default_factory=list)

    def infer(self, observation, instruction, *, noise=None, prev_chunk=None, delay=0, guidance=None):  # noqa: ARG002
        self.seen.append(observation)
        self.noises.append(noise)
        rows = np.stack([self.targets(observation.t_capture_ns + k * PERIOD_NS) for k in range(CHUNK)])
        keys = state_values(ROBOT, rows.T)
        keys = {name: values.T for name, values in keys.items()}
        return PolicyOutput(np.zeros((CHUNK, 200), np.float32), keys, NONE, NONE, StageTimes(0, 0, 0), noise, None)


def stay() -> Scripted:
    """Holds the home pose."""
    from onbeat.drivers.twin.world import HOME_RAD

    return Scripted(lambda _: HOME_RAD)


def expert(seed: int) -> Scripted:
    """Replays what the scripted expert did in a world of its own with the same seed."""
    from onbeat.drivers.twin.world import World
    from onbeat.training.expert import Expert, execute

    world = World()
    world.reset(seed)
    teacher = Expert(world.position_rad)
    goals = [teacher.goal_rad]
    for _ in range(110):
        goals.append(teacher.advance(world.truth(), world.position_rad).copy())
        execute(world, goals[-2], goals[-1])
    return Scripted(lambda t_ns: goals[min(t_ns // PERIOD_NS, len(goals) - 1)])


@pytest.fixture(scope="module")
def scene():
    with Scene() as scene:
        yield scene


def test_a_policy_that_does_nothing_fails_by_time(scene):
    outcome = run_episode(scene, ROBOT, stay(), SEED, replace(CONDITIONS, timeout_ns=1_000_000_000))
    assert outcome.success_s is None
    assert outcome.highest_m < 0.005
    assert outcome.chunks == 10


def test_a_chunk_is_not_visible_before_its_latency_is_over(scene):
    episode = Episode(scene, ROBOT, stay(), SEED, replace(CONDITIONS, latency_ns=250_000_000, timeout_ns=10**9))
    while int(episode.state.timeline.published[0]) == 0:
        episode.step()
    # The tick at 250 ms is the first that sees it; it ends 5 ms later, give or take half a physics step.
    assert abs(scene.world.time_ns - 255_000_000) <= 1_000_000
    assert episode.outcome().held_ticks >= 49


@pytest.mark.parametrize(("latency_ms", "first_row"), [(0, 2), (90, 2), (110, 3), (260, 4)])
def test_the_executed_delay_follows_the_latency(scene, latency_ms, first_row):
    conditions = replace(CONDITIONS, latency_ns=latency_ms * 1_000_000, timeout_ns=1_500_000_000)
    delays = dict(run_episode(scene, ROBOT, stay(), SEED, conditions).delays)
    assert max(delays, key=delays.get) == first_row, delays


def test_chunks_that_come_after_their_last_row_are_late_and_never_run(scene):
    conditions = replace(CONDITIONS, latency_ns=CHUNK * PERIOD_NS, timeout_ns=2_600_000_000)
    outcome = run_episode(scene, ROBOT, stay(), SEED, conditions)
    assert (outcome.chunks, outcome.held_ticks) == (0, 519)  # the first tick starts and does not hold
    assert dict(outcome.delays) == {EXPIRED: 2}
    assert "expired: 2" in as_text([Evaluation("none", conditions, (outcome,))])


def test_inference_waits_for_the_rows_that_are_to_be_executed(scene):
    patient = replace(ROBOT, config=replace(ROBOT.config, execute_steps=4))
    conditions = replace(CONDITIONS, timeout_ns=2_000_000_000)
    eager, waiting = stay(), stay()
    run_episode(scene, ROBOT, eager, SEED, conditions)
    run_episode(scene, patient, waiting, SEED, conditions)
    assert len(waiting.seen) < len(eager.seen) / 3


def test_observations_are_stamped_in_simulated_time_and_rounded_to_servo_steps(scene):
    policy = stay()
    run_episode(scene, ROBOT, policy, SEED, replace(CONDITIONS, timeout_ns=500_000_000))
    assert [o.t_capture_ns for o in policy.seen] == [k * PERIOD_NS for k in range(5)]
    joints = policy.seen[0].state["arm_joints"]
    np.testing.assert_array_equal(joints, in_servo_steps(joints))


def test_a_policy_period_that_no_tick_falls_on_has_a_frame_at_the_tick_behind_it(scene):
    thirty_hz = replace(ROBOT, embodiment=replace(ROBOT.embodiment, policy_period_ms=1000 / 30))
    policy, tick_ns = stay(), 5_000_000
    conditions = replace(CONDITIONS, timeout_ns=500_000_000, latency_ns=10_000_000)
    outcome = run_episode(scene, thirty_hz, policy, SEED, conditions)
    due_ns = [-(-k * 33_333_333 // tick_ns) * tick_ns for k in range(15)]
    assert [o.t_capture_ns for o in policy.seen] == due_ns
    assert outcome.held_ticks <= 10, "chunks follow each other"


def test_goals_reach_the_world_in_whole_servo_steps(scene, monkeypatch):
    goals, set_goal = [], scene.world.set_goal_rad
    monkeypatch.setattr(scene.world, "set_goal_rad", lambda q: (goals.append(q.copy()), set_goal(q)))
    run_episode(scene, ROBOT, stay(), SEED, replace(CONDITIONS, timeout_ns=300_000_000))
    assert len(goals) == 60  # one per tick
    np.testing.assert_allclose(np.array(goals) / RAD_PER_STEP, np.rint(np.array(goals) / RAD_PER_STEP), atol=1e-9)
    assert np.ptp(goals, axis=0).max() > RAD_PER_STEP  # it does go somewhere: home has noise that the policy takes out


def test_the_blank_control_blanks_every_frame(scene):
    policy = stay()
    run_episode(scene, ROBOT, policy, SEED, replace(CONDITIONS, timeout_ns=300_000_000, shown=BLANK))
    frames = [frame.rgb for observation in policy.seen for frame in observation.views.values()]
    assert len(frames) == 6
    assert not any(frame.any() for frame in frames)


def test_the_shuffle_control_shows_this_arm_and_another_cube(scene):
    as_is, shuffled = stay(), stay()
    run_episode(scene, ROBOT, as_is, SEED, replace(CONDITIONS, timeout_ns=200_000_000))
    run_episode(scene, ROBOT, shuffled, SEED, replace(CONDITIONS, timeout_ns=200_000_000, shown=OTHER))
    for own, other in zip(as_is.seen, shuffled.seen, strict=True):
        np.testing.assert_array_equal(own.state["arm_joints"], other.state["arm_joints"])
        differs = (own.views["top"].rgb != other.views["top"].rgb).any(-1)
        assert 0 < differs.mean() < 0.2  # a cube left one place and lies at another; the rest is the same


def test_the_same_seed_gives_the_same_episode_and_noise(scene):
    first, second, third = stay(), stay(), stay()
    conditions = replace(CONDITIONS, timeout_ns=400_000_000)
    outcomes = [run_episode(scene, ROBOT, policy, SEED, conditions) for policy in (first, second)]
    run_episode(scene, ROBOT, third, SEED + 1, conditions)
    assert outcomes[0] == outcomes[1]
    np.testing.assert_array_equal(first.noises, second.noises)
    assert (first.noises[0] != third.noises[0]).any()
    assert (first.noises[0] != first.noises[1]).any()
    np.testing.assert_array_equal(first.seen[-1].views["wrist"].rgb, second.seen[-1].views["wrist"].rgb)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED, SEED + 3])
def test_what_the_expert_does_counts_as_success(scene, seed):
    outcome = run_episode(scene, ROBOT, expert(seed), seed, CONDITIONS)
    assert outcome.success_s is not None
    assert 1.0 < outcome.success_s < 12.0
    assert outcome.highest_m > 0.05


@pytest.mark.slow
def test_workers_do_not_change_the_outcomes():
    conditions = replace(CONDITIONS, timeout_ns=500_000_000)
    told = []
    alone = evaluate(stay, range(SEED, SEED + 3), conditions=conditions, progress=told.append)
    together = evaluate(_stay, range(SEED, SEED + 3), conditions=conditions, workers=2)
    assert alone.outcomes == together.outcomes == tuple(told)
    assert [outcome.seed for outcome in told] == [SEED, SEED + 1, SEED + 2]


_stay = functools.partial(stay)


class NoPolicy(OnbeatError):
    pass


def refuse() -> Scripted:
    raise NoPolicy("there is none: make one")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_policy_that_cannot_be_opened_ends_the_evaluation_with_its_own_error(workers):
    with pytest.raises(NoPolicy, match="make one"):
        evaluate(refuse, range(SEED, SEED + 4), conditions=CONDITIONS, workers=workers)


def test_a_folder_that_is_no_bundle_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(NotABundle):
        command.main(["--bundle", str(tmp_path)])


def test_a_real_arm_is_refused_for_the_figures_would_be_the_twins():
    with pytest.raises(RobotError, match=r"so101 is a real arm.*choose so101-twin"):
        command.main(["--robot", "so101", "--seeds", "1"])


def fake_evaluation(control: str, successes: int, attempts: int) -> Evaluation:
    outcomes = (Outcome(SEED + k, 3.5 if k < successes else None, 0.1, 40, 7, 2, {2: 39}) for k in range(attempts))
    return Evaluation(control, CONDITIONS, tuple(outcomes))


def test_text_has_every_seed_once_and_every_control_with_its_interval():
    text = as_text([fake_evaluation("none", 8, 10), fake_evaluation("blank", 0, 10)])
    assert sum(line.startswith(str(SEED)[:3]) for line in text.splitlines()) == 10
    whole, blank = (line.split() for line in text.splitlines()[-2:])
    assert whole == ["none", "8", "of", "10", "80", "49-94", "2:", "390"]
    assert blank == ["blank", "0", "of", "10", "0", "0-28", "2:", "390"]


def test_json_has_rate_interval_conditions_and_outcomes():
    (document,) = json.loads(as_json([fake_evaluation("none", 1, 2)]))
    assert document["success_rate"] == 0.5
    assert document["successes"] == 1
    assert document["conditions"]["latency_ns"] == 60_000_000
    assert [outcome["seed"] for outcome in document["outcomes"]] == [SEED, SEED + 1]


@pytest.mark.parametrize(("asked", "run"), [("none", ["none"]), ("blank", ["none", "blank"]), ("all", list(CONTROLS))])
def test_command_runs_the_policy_and_the_asked_controls(monkeypatch, capsys, tmp_path, asked, run):
    monkeypatch.setattr(command, "load_bundle", lambda _: None)
    monkeypatch.setattr(command, "_evaluate_bundle", lambda _, control, __: fake_evaluation(control, 1, 2))
    assert command.main(["--control", asked, "--json", "--out", str(tmp_path / "deep" / "e.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [entry["control"] for entry in printed] == run
    assert json.loads((tmp_path / "deep" / "e.json").read_text()) == printed


@pytest.mark.parametrize(
    "wrong",
    [["--seeds", "0"], ["--workers", "-1"], ["--control", "luck"], ["--latency-ms", "-1"], ["--timeout-s", "nan"]],
)
def test_wrong_usage_exits_2(wrong):
    with pytest.raises(SystemExit) as leaving:
        command.main(wrong)
    assert leaving.value.code == 2
