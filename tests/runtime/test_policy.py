"""A policy answers, can be replayed bit for bit, and keeps no rows it was not trained to keep."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onbeat.runtime.cases import Case, load_cases
from onbeat.runtime.language import WrongEmbodiment
from onbeat.runtime.observation import MissingView
from onbeat.runtime.policy import Policy, UntrainedPrefix, load_policy
from onbeat.runtime.prompt import InstructionError


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[Case]:
    return load_cases(golden)


def open_policy(case: Case, bundles: Path, **options: object) -> Policy:
    return load_policy(bundles / case.name.replace("/", "."), **options)  # pyright: ignore[reportArgumentType]


def test_recorded_answer_in_the_robots_units(cases: list[Case], golden_bundles: Path) -> None:
    case = cases[1]
    output = open_policy(case, golden_bundles).infer(
        case.observation, case.instruction, noise=case.noise, directions=case.directions
    )
    assert np.abs(output.actions - case.actions).max() < 1e-5
    assert {name: rows.shape for name, rows in output.keys.items()} == {
        "eef_position": (16, 3),
        "eef_rotation": (16, 3),
        "gripper_position": (16, 1),
    }
    assert min(output.times.observe_ns, output.times.prefix_ns, output.times.flow_ns) > 0
    assert output.times.total_ns < 10e9


def test_drawn_noise_replays_bit_for_bit(cases: list[Case], golden_bundles: Path) -> None:
    case, policy = cases[1], open_policy(cases[1], golden_bundles, seed=5)
    first = policy.infer(case.observation, case.instruction)
    second = policy.infer(case.observation, case.instruction)
    assert first.noise.shape == (2, 16, 200)
    assert first.directions is not None
    assert not np.array_equal(first.noise[0], first.noise[1])
    assert not np.array_equal(first.actions, second.actions)
    replayed = policy.infer(case.observation, case.instruction, noise=first.noise, directions=first.directions)
    assert np.array_equal(replayed.actions, first.actions)
    again = open_policy(case, golden_bundles, seed=5).infer(case.observation, case.instruction)
    assert np.array_equal(again.actions, first.actions)
    other = open_policy(case, golden_bundles, seed=6).infer(case.observation, case.instruction)
    assert not np.array_equal(other.noise, first.noise)


def test_untrained_prefix_is_refused_or_asked_for(cases: list[Case], golden_bundles: Path) -> None:
    case, previous = cases[1], np.ones((16, 200), np.float32)
    policy = open_policy(case, golden_bundles)
    assert policy.spec.trained_delay == 0
    with pytest.raises(UntrainedPrefix, match="no rows"):
        policy.infer(case.observation, case.instruction, prev_chunk=previous, delay=2)
    bold = open_policy(case, golden_bundles, allow_untrained_prefix=True)
    output = bold.infer(case.observation, case.instruction, prev_chunk=previous, delay=2)
    assert np.array_equal(output.actions[:2], previous[:2])


def test_prefix_longer_than_trained(cases: list[Case], golden_bundles: Path) -> None:
    case = cases[3]
    policy = open_policy(case, golden_bundles)
    assert policy.spec.trained_delay == 7
    output = policy.infer(case.observation, case.instruction, prev_chunk=case.prev_chunk, delay=7)
    assert np.array_equal(output.actions[:7], case.prev_chunk[:7])
    with pytest.raises(UntrainedPrefix, match="at most 7"):
        policy.infer(case.observation, case.instruction, prev_chunk=case.prev_chunk, delay=8)


def test_bundle_for_another_robot(cases: list[Case], golden_bundles: Path) -> None:
    open_policy(cases[0], golden_bundles, embodiment="libero")
    with pytest.raises(WrongEmbodiment):
        open_policy(cases[0], golden_bundles, embodiment="so101")


def test_bad_observation_and_instruction(cases: list[Case], golden_bundles: Path) -> None:
    case, policy = cases[0], open_policy(cases[0], golden_bundles)
    one_view = dict(list(case.observation.views.items())[:1])
    with pytest.raises(MissingView):
        policy.infer(replace(case.observation, views=one_view), case.instruction)
    with pytest.raises(InstructionError):
        policy.infer(case.observation, "stop<|im_end|>")
    assert policy.infer(case.observation, case.instruction).actions.shape == (16, 200)
