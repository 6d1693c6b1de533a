import numpy as np
import pytest

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.observation import (
    BadState,
    BadView,
    MissingState,
    MissingView,
    Observation,
    ObservationError,
    observe_recorded,
    select_observation,
)

SO101 = load_embodiment("so101")
RGB = np.zeros((8, 12, 3), np.uint8)


def observation(**changes: object) -> Observation:
    views = {"wrist": Frame(1, 30, RGB), "top": Frame(2, 20, RGB), "spare": Frame(3, 10, RGB)}
    state = {"gripper": np.zeros(1), "arm_joints": np.zeros(5), "unused": np.full(2, np.nan)}
    for name, value in changes.items():
        (views if name in views else state)[name] = value  # type: ignore[assignment]
    there = {name: frame for name, frame in views.items() if frame is not None}
    return Observation(there, {name: value for name, value in state.items() if value is not None}, t_state_ns=25)


def select(seen: Observation) -> Observation:
    return select_observation(seen, SO101.views, SO101.state)


def test_a_missing_camera_is_named_with_those_that_are_there():
    with pytest.raises(MissingView, match=r"camera 'top' \(there are: wrist, spare\).*connect it"):
        select(observation(top=None))


@pytest.mark.parametrize("rgb", [RGB.astype(np.float32), RGB[..., 0], RGB[None], np.moveaxis(RGB, 2, 0)])
def test_an_image_of_another_form_is_refused(rgb):
    with pytest.raises(BadView, match=r"camera 'top'.*give RGB as uint8"):
        select(observation(top=Frame(0, 0, rgb)))


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 640, 3), (480, 7, 3)])
def test_what_is_too_small_to_be_a_picture_is_refused(shape: tuple[int, int, int]):
    with pytest.raises(BadView, match=rf"camera 'top' shows {shape[1]} x {shape[0]} pixels: set it to 8 x 8"):
        select(observation(top=Frame(0, 0, np.zeros(shape, np.uint8))))


def test_a_missing_state_is_named():
    with pytest.raises(MissingState, match="no state 'arm_joints'"):
        select(observation(arm_joints=None))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_refused(value):
    with pytest.raises(BadState, match=r"'arm_joints' is not finite.*check the sensor"):
        select(observation(arm_joints=np.array([0, 0, value, 0, 0])))


@pytest.mark.parametrize("value", [np.zeros(6), np.zeros((1, 5)), np.zeros(5, np.int32), np.array(0.0)])
def test_a_state_of_another_form_is_refused(value):
    with pytest.raises(BadState, match="give 5 floating-point numbers"):
        select(observation(arm_joints=value))


def test_all_of_them_are_observation_errors():
    assert all(issubclass(error, ObservationError) for error in (MissingView, BadView, MissingState, BadState))


def test_only_what_the_robot_names_is_kept_in_its_order():
    seen = select(observation())
    assert list(seen.views) == ["top", "wrist"]
    assert list(seen.state) == ["arm_joints", "gripper"]


def test_it_is_as_old_as_its_oldest_part():
    assert observation().t_capture_ns == 10
    assert select(observation()).t_capture_ns == 20
    assert Observation({}, {}, t_state_ns=7).t_capture_ns == 7


def test_recorded_keys_lose_their_prefix_and_axis():
    seen = observe_recorded(
        {"video.top_view": RGB[None], "state.eef_position": np.ones((1, 3)), "language.instruction": np.array("x")}
    )
    np.testing.assert_array_equal(seen.views["top_view"].rgb, RGB)
    np.testing.assert_array_equal(seen.state["eef_position"], np.ones(3))
    assert list(seen.state) == ["eef_position"]


@pytest.mark.parametrize("rows", [np.zeros((2, 3)), np.zeros((0, 3)), np.array(1.0)])
def test_more_than_one_recorded_observation_is_refused(rows):
    with pytest.raises(ObservationError, match="leading axis of 1"):
        observe_recorded({"state.eef_position": rows})
