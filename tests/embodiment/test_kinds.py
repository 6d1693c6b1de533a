"""Kinds of action keys against SciPy: what a step, an offset and a turn mean, and the way back for a prefix."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from onbeat.embodiment.kinds import from_absolute, to_absolute
from onbeat.embodiment.robot import KINDS, ActionKey, Embodiment
from onbeat.embodiment.rotation import ROTATION_SIZES, convert_rotation, turn_between, turn_further
from onbeat.embodiment.schema import load_embodiment

FORMS = tuple(ROTATION_SIZES)


def rotations(seed: int, count: int, most_rad: float = 3.0) -> Rotation:
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(count, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    return Rotation.from_rotvec(axis * rng.uniform(0, most_rad, (count, 1)))


def in_form(rotation: Rotation, form: str) -> np.ndarray:
    return convert_rotation(rotation.as_rotvec(), "axis_angle", form)


def assert_same(found: np.ndarray, form: str, expected: Rotation) -> None:
    turned = Rotation.from_rotvec(convert_rotation(found, form, "axis_angle"))
    assert (turned * expected.inv()).magnitude().max() < 1e-7


def robot(kind: str, form: str | None) -> Embodiment:
    """Three numbers that add, and one rotation, or one number more."""
    keys = (
        ActionKey("position", 0, 3, kind=kind),
        ActionKey("rotation", 3, 6, rotation=form, kind=kind) if form else ActionKey("more", 3, 4, kind=kind),
    )
    return replace(load_embodiment("so101"), action=keys)


@pytest.mark.parametrize("form", FORMS)
class TestTurns:
    def test_the_turn_is_about_axes_of_the_parent_frame(self, form: str):
        start, by = rotations(0, 50), rotations(1, 50)
        assert_same(turn_further(in_form(start, form), in_form(by, form), form), form, by * start)

    def test_between_is_what_leads_from_one_to_the_other(self, form: str):
        start, end = rotations(2, 50), rotations(3, 50)
        assert_same(turn_between(in_form(start, form), in_form(end, form), form), form, end * start.inv())


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, form: str | None):
    about, rng = robot(kind, form), np.random.default_rng(4)
    turns = [in_form(rotations(k, 9, 1.0), form) if form else rng.normal(size=(9, 1)) for k in (5, 6)]
    rows = np.hstack([rng.normal(size=(9, 3)), turns[0]])
    around = {
        "committed": np.append(rng.normal(size=3), turns[1][0]),
        "observed": np.append(rng.normal(size=3), turns[1][1]),
    }
    targets = to_absolute(about, rows, **around)
    again = from_absolute(about, targets, **around)
    np.testing.assert_allclose(again[:, :3], rows[:, :3], atol=1e-12)
    if form is None:
        np.testing.assert_allclose(again, rows, atol=1e-12)
    else:
        assert_same(again[:, 3:], form, Rotation.from_rotvec(convert_rotation(rows[:, 3:], form, "axis_angle")))


@pytest.mark.parametrize("form", FORMS)
class TestRotations:
    """Sizes at which adding axis-angles would be wrong by tenths of a radian."""

    def test_steps_are_composed_from_what_is_committed(self, form: str):
        about, start, steps = robot("delta_per_step", form), rotations(7, 1)[0], rotations(8, 6, 1.0)
        rows = np.hstack([np.full((6, 3), 0.5), in_form(steps, form)])
        committed = np.append(np.ones(3), in_form(start, form))
        targets = to_absolute(about, rows, committed=committed, observed=np.full_like(committed, np.nan))
        np.testing.assert_allclose(targets[:, 0], 1 + 0.5 * np.arange(1, 7))
        expected = start
        for row, step in enumerate(steps):
            expected = step * expected
            assert_same(targets[row, 3:], form, expected)

    def test_offsets_are_composed_with_what_was_seen(self, form: str):
        about, seen, offsets = robot("relative_to_observation", form), rotations(9, 1)[0], rotations(10, 6)
        rows = np.hstack([np.full((6, 3), 0.5), in_form(offsets, form)])
        observed = np.append(np.full(3, 2.0), in_form(seen, form))
        targets = to_absolute(about, rows, committed=np.full_like(observed, np.nan), observed=observed)
        assert (targets[:, :3] == 2.5).all()
        assert_same(targets[:, 3:], form, offsets * seen)

    def test_a_prefix_moves_to_a_newer_observation(self, form: str):
        """The same targets, told from where the arm is now; rows of the old telling would lead elsewhere."""
        about, targets = robot("relative_to_observation", form), rotations(11, 5, 1.0)
        rows = np.hstack([np.ones((5, 3)), in_form(targets, form)])
        tellings = []
        for seed in (12, 13):
            observed = np.append(np.full(3, seed), in_form(rotations(seed, 1)[0], form))
            tellings.append(from_absolute(about, rows, committed=observed, observed=observed))
            back = to_absolute(about, tellings[-1], committed=observed, observed=observed)
            assert_same(back[:, 3:], form, targets)
        assert np.abs(tellings[0] - tellings[1]).max() > 0.1


class TestNumbers:
    def test_steps_start_from_what_is_committed_and_not_from_what_was_seen(self):
        targets = to_absolute(
            robot("delta_per_step", None), np.full((3, 4), 0.1), committed=np.full(4, 0.5), observed=np.zeros(4)
        )
        np.testing.assert_allclose(targets[:, 0], [0.6, 0.7, 0.8])

    def test_offsets_start_from_what_was_seen(self):
        targets = to_absolute(
            robot("relative_to_observation", None),
            np.full((3, 4), 0.1),
            committed=np.full(4, 0.5),
            observed=np.full(4, 0.2),
        )
        np.testing.assert_allclose(targets, 0.3)

    def test_targets_are_what_they_are(self):
        rows = np.arange(12.0).reshape(3, 4)
        assert (to_absolute(robot("absolute", None), rows, committed=np.ones(4), observed=np.ones(4)) == rows).all()
