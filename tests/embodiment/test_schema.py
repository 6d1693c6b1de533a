from pathlib import Path

import numpy as np
import pytest

from onbeat.embodiment.schema import (
    EmbodimentError,
    embodiment_names,
    find_embodiment,
    load_embodiment,
    observation_keys,
    parse_embodiment,
)

GOOD = """\
title = "two joints"
policy_period_ms = 20
views = ["front"]

[[state]]
name = "arm"
slot = "right_arm_joints[0:2]"   # a part of the slot
normalisation = "min_max"
unit = "rad"

[[action]]
name = "arm"
slot = "right_arm_joints[0:2]"
kind = "absolute"
joints = ["a", "b"]
lower = [-1, -2]
upper = [1, 2]

[[action]]
name = "grip"
slot = "right_gripper"
kind = "delta_per_step"
"""
SOURCE = Path("robots/two.toml")


def test_a_good_file_reads():
    robot = parse_embodiment(GOOD, SOURCE)
    assert robot.name == "two"
    assert robot.policy_period_ns == 20_000_000
    assert (robot.action[0].start, robot.action[0].stop, robot.action[0].joints) == (50, 52, ("a", "b"))
    assert robot.action[0].limits is not None
    assert robot.action[0].limits.velocity == (float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('slot = "right_gripper"', 'slot = "right_arm_joints[1:3]"', 21, "'grip' overlaps 'arm' in the action"),
        ('slot = "right_gripper"', 'slot = "right_griper"', 21, "did you mean 'right_gripper'?"),
        ('slot = "right_gripper"', 'slot = "left_hand_articulation[40:46]"', 21, "beyond the 200 unified numbers"),
        ('slot = "right_gripper"', 'slot = "right_gripper[0:2]"', 21, "leaves its slot of 1 numbers"),
        ('slot = "right_gripper"', 'slot = "head[1:1]"', 21, "leaves its slot of 2 numbers"),
        ('slot = "right_gripper"', 'slot = "50-57"', 21, "'50-57' is no slot"),
        ('slot = "right_gripper"', 'slot = "base_position"', 21, "unknown action slot"),
        ('slot = "right_gripper"', "slot = 18", 21, "'slot' is a int"),
        ('slot = "right_gripper"', 'slt = "right_gripper"', 21, "did you mean 'slot'?"),
        ('slot = "right_gripper"\n', "", 19, "'slot' is missing"),
        ('name = "grip"', 'name = "arm"', 20, "two action keys are called 'arm'"),
        ('kind = "delta_per_step"', 'kind = "delta"', 22, "did you mean 'delta_per_step'?"),
        ('kind = "delta_per_step"', 'kind = "absolute"\nrotation = "axis_angle"', 21, "takes 3 numbers, not 1"),
        ('kind = "delta_per_step"', 'kind = "absolute"\nrotation = "quaternion"', 23, "did you mean 'quaternion_"),
        ('normalisation = "min_max"', 'normalisation = "minmax"', 8, "did you mean 'min_max'?"),
        ('unit = "rad"', 'unit = "deg"', 9, "no unit"),
        ("policy_period_ms = 20", "policy_period_ms = 0", 2, "must be above 0"),
        ("policy_period_ms = 20", "period_ms = 20", 2, "did you mean 'policy_period_ms'?"),
        ('joints = ["a", "b"]', 'joints = ["a"]', 15, "1 joints named for 2 numbers"),
        ("lower = [-1, -2]", "lower = [-1]", 16, "must be 2 numbers"),
        ("lower = [-1, -2]", "lower = [-1, 5]", 16, "must be below 'upper'"),
        ("upper = [1, 2]", "upper = [1, 2]\nvelocity = [1, 0]", 18, "'velocity' of 'arm' must be above 0"),
        ('views = ["front"]', 'views = ["front"]\n[sensors]\nn = 1', 4, "unknown field 'sensors'"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(old, new, line, says):
    assert old in GOOD
    with pytest.raises(EmbodimentError) as error:
        parse_embodiment(GOOD.replace(old, new), SOURCE)
    assert str(error.value).startswith(f"{SOURCE}:{line}: ")
    assert says in str(error.value)


@pytest.mark.parametrize("part", ["[0:1]", "[1:2]", "[0:2]", "[1:3]", "[0:7]", ""])
def test_any_shared_number_is_an_overlap(part):
    with pytest.raises(EmbodimentError, match="'grip' overlaps 'arm'"):
        parse_embodiment(GOOD.replace("right_gripper", f"right_arm_joints{part}"), SOURCE)


@pytest.mark.parametrize("part", ["right_arm_joints[2:3]", "left_hand_reserved[5:6]", "reserved_46[3:4]"])
def test_neighbours_do_not_overlap(part):
    assert parse_embodiment(GOOD.replace("right_gripper", part), SOURCE).action[1].size == 1


def test_two_keys_overlap_whichever_comes_first():
    swapped = GOOD.replace("[0:2]", "[4:6]").replace("right_gripper", "right_arm_joints[3:5]")
    with pytest.raises(EmbodimentError, match="'grip' overlaps 'arm'"):
        parse_embodiment(swapped, SOURCE)


def test_toml_syntax_is_refused_with_the_line():
    with pytest.raises(EmbodimentError, match=r"two\.toml.*line 2"):
        parse_embodiment('title = "x"\nviews = top\n', SOURCE)


def test_unknown_names_and_paths():
    with pytest.raises(EmbodimentError, match="did you mean 'so101'"):
        load_embodiment("so100")
    with pytest.raises(EmbodimentError, match=r"nowhere\.toml cannot be read"):
        load_embodiment(Path("nowhere.toml"))


@pytest.mark.parametrize("name", embodiment_names())
def test_every_robot_loads_and_reads_the_same_from_its_path(name):
    robot = load_embodiment(name)
    assert robot.name == name
    assert robot.source is not None
    assert load_embodiment(robot.source) == robot


@pytest.mark.parametrize(
    ("name", "joints"), [("adam_u", 31), ("g1_o6", 26), ("fr3_inspire", 13), ("d1", 14), ("so101", 6), ("libero", 0)]
)
def test_degrees_of_freedom(name, joints):
    robot = load_embodiment(name)
    assert len(robot.joints) == len(set(robot.joints)) == joints
    assert len(robot.limits().lower) == sum(key.size for key in robot.action)


def test_so101_drives_its_bus_order():
    robot = load_embodiment("so101")
    assert robot.joints == ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    assert [(key.name, key.start, key.stop, key.kind) for key in robot.action] == [
        ("arm_joints", 50, 55, "absolute"),
        ("gripper", 18, 19, "absolute"),
    ]
    assert robot.views == ("top", "wrist")
    assert robot.policy_period_ms == 100
    assert all(np.isfinite(robot.limits().velocity + robot.limits().acceleration))


def test_a_robot_without_limits_does_not_move():
    with pytest.raises(EmbodimentError, match="'grip' has no limits"):
        parse_embodiment(GOOD, SOURCE).limits()


def test_flatten_and_split_are_inverse():
    robot = load_embodiment("so101")
    rows = np.arange(18.0).reshape(3, 6)
    parts = robot.split(rows)
    assert {name: part.shape for name, part in parts.items()} == {"arm_joints": (3, 5), "gripper": (3, 1)}
    np.testing.assert_array_equal(robot.flatten(parts), rows)


def test_released_checkpoints_normalise_nothing_but_switches():
    assert not load_embodiment("libero").needs_statistics
    assert not load_embodiment("robocasa").needs_statistics
    switches = {key.name for key in load_embodiment("robocasa").action if key.normalisation == "binary"}
    assert switches == {"gripper_position", "control_mode"}
    assert all(key.normalisation is None for key in load_embodiment("robocasa").state)


def test_what_the_published_clients_do():
    libero, robocasa = load_embodiment("libero"), load_embodiment("robocasa")
    assert (libero.client_image, robocasa.client_image) == ("rotate_180", "flip_vertical")
    sent = {key.name: (key.client_scale, key.client_offset) for key in robocasa.action}
    assert sent["gripper_position"] == (-2, 1)  # 2 (1 - g) - 1
    assert sent["control_mode"] == (2, -1)
    assert sent["eef_position"] == (1, 0)
    assert [(k.client_scale, k.client_offset) for k in libero.action][-1] == (-2, 1)


def test_find_by_published_name():
    assert find_embodiment(data_config="libero_nonorm").name == "libero"
    assert find_embodiment(tag="robocasa").name == "robocasa"
    assert find_embodiment(data_config="unheard_of", dataset="robocasa_human_posttrain").name == "robocasa"


def test_find_by_what_an_observation_contains():
    for name in embodiment_names():
        keys = (*observation_keys(load_embodiment(name)), "state.state", "language.instruction")
        assert find_embodiment(data_config="unheard_of", keys=keys).name == name


def test_find_refuses_to_guess():
    with pytest.raises(EmbodimentError, match="none of the embodiments"):
        find_embodiment(keys=["video.top_view"])
    both = {key for name in ("g1_o6", "human_hand") for key in observation_keys(load_embodiment(name))}
    assert find_embodiment(keys=sorted(both)).name == "human_hand"  # the larger one explains more keys
