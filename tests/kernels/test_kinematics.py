"""The tool's place against a simulator that has the same arm, and whether it can be kept in a box."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.embodiment.chains import CHAINS
from onbeat.kernels.kinematics import (
    Workspace,
    excess_m,
    leaves,
    new_workspace,
    no_workspace,
    tool,
    tool_reference,
)
from onbeat.kernels.limit import braking_distance, braking_steps

LOW, HIGH = np.array([-0.5, -0.5, 0.0]), np.array([0.5, 0.5, 0.6])
A_MAX = np.full(6, 20.0)
LIFT = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # the shoulder lift leans the arm forward and down
angles = st.lists(st.floats(-1.6, 1.6), min_size=6, max_size=6).map(np.array)


def box(low=LOW, high=HIGH) -> Workspace:
    chain = CHAINS["so101"]
    offsets, axes = ([getattr(link, name) for link in chain.links] for name in ("offset_m", "axis"))
    return new_workspace(*map(np.array, (offsets, axes, chain.tool_m, low, high)), joints=6)


def place(q, workspace: Workspace) -> np.ndarray:
    tool(q, workspace)
    return workspace.place_m.copy()


def test_at_zero_the_links_add_up():
    chain = CHAINS["so101"]
    summed = np.sum([link.offset_m for link in chain.links], axis=0) + chain.tool_m
    assert place(np.zeros(6), box()) == pytest.approx(summed, abs=1e-15)


@settings(max_examples=200, deadline=None)
@given(angles)
def test_compiled_equals_the_reference(q):
    assert place(q, box()) == pytest.approx(tool_reference(q, box()), abs=1e-14)


def test_it_is_where_the_simulator_has_it():
    world_module = pytest.importorskip("onbeat.drivers.twin.world")
    world, rng = world_module.World(0), np.random.default_rng(0)
    for _ in range(50):
        q = rng.uniform(-1.5, 1.5, 6)
        world.set_arm_rad(q)
        assert place(q, box()) == pytest.approx(world.data.site("grasp").xpos, abs=1e-12)


@pytest.mark.parametrize(("axis", "side"), [(0, 1), (1, 1), (2, 1), (0, -1), (1, -1), (2, -1)])
def test_excess_is_the_worst_side(axis: int, side: int):
    q = np.array([0.2, -0.8, 0.6, 1.2, 0.0, 0.0])
    at = place(q, box())
    low, high = at - 0.1, at + 0.1
    (high if side > 0 else low)[axis] = at[axis] - side * 0.03
    assert excess_m(q, box(low, high)) == pytest.approx(0.03, abs=1e-12)
    assert excess_m(q, box(at - 0.1, at + 0.1)) == pytest.approx(-0.1, abs=1e-12)


def test_without_a_chain_nothing_leaves():
    assert not leaves(np.zeros(6), np.full(6, 9.0), np.full(6, 9.0), A_MAX, 0.01, no_workspace(6))


def test_outside_it_may_only_come_in():
    """From under the table: up is allowed, further down is not."""
    workspace = box()
    below = np.array([0.0, 0.9, 0.6, 0.8, 0.0, 0.0])
    assert excess_m(below, workspace) > 0
    up, down = below - 0.002 * LIFT, below + 0.002 * LIFT
    assert not leaves(below, up, np.zeros(6), A_MAX, 0.01, workspace)
    assert leaves(below, down, np.zeros(6), A_MAX, 0.01, workspace)


def test_speed_counts_as_the_way_that_braking_takes():
    """The same step, inside by itself, is refused at a speed from which the arm comes to rest outside."""
    workspace = box()
    q = np.array([0.0, 0.0, 0.6, 0.8, 0.0, 0.0])
    while excess_m(q + 0.1 * LIFT, workspace) < 0:
        q = q + 0.01 * LIFT
    assert not leaves(q, q, np.zeros(6), A_MAX, 0.01, workspace)
    assert leaves(q, q, 3.0 * LIFT, A_MAX, 0.01, workspace)


@settings(max_examples=200, deadline=None)
@given(v=st.floats(-4, 4), h=st.floats(0.01, 1), dt=st.floats(0.001, 0.02), steps=st.integers(0, 500))
def test_braking_distance_is_the_sum_of_the_steps(v, h, dt, steps):
    way, speed = 0.0, abs(v)
    for _ in range(min(steps, braking_steps(v, h))):
        speed -= h
        way += speed * dt
    assert braking_distance(v, h, dt, steps) == pytest.approx(np.sign(v) * way, abs=1e-9)
