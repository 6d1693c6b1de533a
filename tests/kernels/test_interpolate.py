"""Time to row, fraction and target: edges first, then every variant against the reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.kernels.interpolate import BEFORE_FIRST_ROW, VARIANTS, interpolate_reference

PERIOD_NS = 100_000_000
ROWS = np.array([[0.0, 10.0], [1.0, 10.0], [3.0, 6.0]])


def at(now_ns: int, variant: str = "numpy", length: int = 3, t0_ns: int = 0):
    out = np.zeros(2)
    row, fraction = VARIANTS[variant](ROWS, length, t0_ns, PERIOD_NS, now_ns, out)
    return row, fraction, out


@pytest.mark.parametrize("variant", VARIANTS)
class TestEdges:
    def test_nothing_is_due_before_row_zero(self, variant: str):
        row, _, out = at(-1, variant)
        assert row == BEFORE_FIRST_ROW == -1, "as recorded ticks say it"
        assert np.isnan(out).all()

    def test_row_zero_is_exact_at_its_time(self, variant: str):
        row, fraction, out = at(0, variant)
        assert (row, fraction, out.tolist()) == (0, 0.0, [0.0, 10.0])

    def test_a_quarter_of_the_way(self, variant: str):
        row, fraction, out = at(PERIOD_NS + PERIOD_NS // 4, variant)
        assert (row, fraction, out.tolist()) == (1, 0.25, [1.5, 9.0])

    def test_the_last_row_is_held_for_its_period(self, variant: str):
        assert at(2 * PERIOD_NS, variant)[:2] == (2, 0.0)
        row, _, out = at(3 * PERIOD_NS - 1, variant)
        assert (row, out.tolist()) == (2, [3.0, 6.0])

    def test_nothing_is_due_after_the_last_row(self, variant: str):
        row, _, out = at(3 * PERIOD_NS, variant)
        assert row == 3
        assert np.isnan(out).all()

    def test_rows_past_the_length_are_not_read(self, variant: str):
        row, _, out = at(PERIOD_NS + 1, variant, length=2)
        assert (row, out.tolist()) == (1, [1.0, 10.0])

    def test_monotonic_nanoseconds_keep_their_precision(self, variant: str):
        t0_ns = 2**62
        row, fraction, _ = at(t0_ns + PERIOD_NS + 1, variant, t0_ns=t0_ns)
        assert (row, fraction) == (1, 1e-8)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 17),
    joints=st.integers(1, 7),
    period_ns=st.integers(1_000_000, 200_000_000),
    offset=st.floats(-2.0, 20.0),
)
def test_variants_equal_the_reference(seed: int, rows: int, joints: int, period_ns: int, offset: float):
    targets = np.random.default_rng(seed).normal(size=(rows, joints))
    now_ns = 10**15 + int(offset * period_ns)
    expected = np.zeros(joints)
    where = interpolate_reference(targets, rows, 10**15, period_ns, now_ns, expected)
    for variant in VARIANTS.values():
        out = np.zeros(joints)
        assert variant(targets, rows, 10**15, period_ns, now_ns, out) == where
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-15)
