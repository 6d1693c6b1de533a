from itertools import pairwise

import pytest

from onbeat.embodiment.slots import SLOTS, UNIFIED_DIM, UnknownSlot, find_slot


@pytest.mark.parametrize(
    ("name", "side", "remedy"),
    [
        ("right_arm_joint", "state", "did you mean 'right_arm_joints'?"),
        ("base_motion", "state", "did you mean 'base_rotation'?"),  # exists in the action only
        ("right_hand_shape", "action", "did you mean"),
        ("", "state", "choose one of right_eef_position"),
    ],
)
def test_unknown_slot_names_the_closest(name, side, remedy):
    with pytest.raises(UnknownSlot, match=f"unknown {side} slot '{name}'") as error:
        find_slot(name, side)
    assert remedy in str(error.value)


def test_state_slots_tile_the_vector_exactly():
    edges = [(s.start, s.stop) for s in sorted(SLOTS, key=lambda s: s.start) if "state" in s.sides]
    assert edges[0][0] == 0
    assert edges[-1][1] == UNIFIED_DIM
    assert all(before[1] == after[0] for before, after in pairwise(edges))


def test_action_slots_do_not_overlap_and_lack_only_the_hand_shapes():
    covered = [i for s in SLOTS if "action" in s.sides for i in range(s.start, s.stop)]
    assert len(covered) == len(set(covered))
    assert set(range(UNIFIED_DIM)) - set(covered) == set(range(90, 110))


@pytest.mark.parametrize(
    ("name", "side", "start", "stop"),
    [
        ("right_eef_rotation", "action", 3, 6),
        ("left_eef_position", "state", 9, 12),
        ("right_gripper", "action", 18, 19),
        ("two_finger_gripper", "state", 44, 46),
        ("right_arm_joints", "state", 50, 57),
        ("waist", "action", 66, 69),
        ("base_rotation", "state", 73, 76),
        ("base_motion", "action", 70, 74),
        ("control_mode", "action", 74, 75),
        ("left_hand_articulation", "state", 155, 200),
    ],
)
def test_published_ranges(name, side, start, stop):
    slot = find_slot(name, side)
    assert (slot.start, slot.stop, slot.size) == (start, stop, stop - start)
