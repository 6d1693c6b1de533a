"""Old rows, a fade, new rows: edges first, then both variants against each other; and the weights of guidance."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.kernels.splice import VARIANTS, guidance_weights

NAN = float("nan")


def splice(variant: str, old: list[float], new: list[float], first_row: int, blend_rows: int) -> list[float]:
    columns = [np.array(rows, float)[:, None] * np.ones(2) for rows in (old, new)]
    out = VARIANTS[variant](*columns, first_row, blend_rows)
    assert ((out[:, 0] == out[:, 1]) | np.isnan(out[:, 0])).all()
    return out[:, 0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
class TestEdges:
    def test_no_blend_is_a_cut(self, variant: str):
        assert splice(variant, [0, 0, 0, 0], [1, 2, 3, 4], 2, 0) == [0, 0, 3, 4]

    def test_everything_may_be_new(self, variant: str):
        assert splice(variant, [NAN] * 3, [1, 2, 3], 0, 2) == [1, 2, 3]

    def test_the_fade_is_even_and_ends_in_the_new_alone(self, variant: str):
        assert splice(variant, [0] * 6, [1] * 6, 1, 3) == [0, 0.25, 0.5, 0.75, 1, 1]

    def test_it_may_begin_at_the_first_row(self, variant: str):
        assert splice(variant, [0] * 3, [1] * 3, 0, 1) == [0.5, 1, 1]

    def test_it_ends_where_the_old_path_does(self, variant: str):
        assert splice(variant, [0, 0, NAN, NAN], [1] * 4, 1, 3) == [0, 0.5, 1, 1]

    def test_no_old_row_at_the_seam_is_a_cut(self, variant: str):
        assert splice(variant, [0, NAN, NAN, NAN], [1] * 4, 1, 3) == [0, 1, 1, 1]

    def test_it_never_leaves_the_chunk(self, variant: str):
        found = splice(variant, [0] * 4, [1] * 4, 2, 9)
        np.testing.assert_allclose(found, [0, 0, 1 / 3, 2 / 3])

    def test_a_row_of_the_old_path_with_one_joint_missing_is_none(self, variant: str):
        old = np.zeros((3, 2))
        old[1, 1] = NAN
        out = VARIANTS[variant](old, np.ones((3, 2)), 1, 2)
        assert out.tolist() == [[0, 0], [1, 1], [1, 1]]

    def test_rows_of_the_new_chunk_before_the_seam_are_not_read(self, variant: str):
        assert splice(variant, [5, 5, 5], [NAN, NAN, 1], 2, 0) == [5, 5, 1]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 17), joints=st.integers(1, 7), blend=st.integers(0, 20))
def test_variants_agree_and_a_fade_only_ever_comes_closer(seed: int, rows: int, joints: int, blend: int):
    rng = np.random.default_rng(seed)
    old, new = rng.normal(size=(2, rows, joints))
    first_row = int(rng.integers(0, rows))
    old[int(rng.integers(0, rows + 1)) :] = np.nan
    found = [variant(old, new, first_row, blend) for variant in VARIANTS.values()]
    np.testing.assert_allclose(found[0], found[1], atol=1e-15)
    share = ((found[0] - old) / (new - old))[first_row:]
    share = share[~np.isnan(share[:, 0])]
    assert (np.diff(share, axis=0) >= -1e-9).all()
    assert ((share > 0) & (share <= 1 + 1e-9)).all()


class TestGuidanceWeights:
    def test_one_for_rows_that_will_have_run_zero_for_rows_that_are_replaced(self):
        weights = guidance_weights(16, 3, 6)
        assert weights.dtype == np.float32
        assert weights[:3].tolist() == [1, 1, 1]
        assert (weights[10:] == 0).all()
        assert ((weights[3:10] > 0) & (weights[3:10] < 1)).all()
        assert (np.diff(weights[2:11]) < 0).all()

    @pytest.mark.parametrize("row", [3, 5, 9])
    def test_between_them_the_published_decay(self, row: int):
        c = (16 - 6 - row) / (16 - 6 - 3 + 1)
        assert guidance_weights(16, 3, 6)[row] == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1), rel=1e-6)

    def test_without_a_delay_the_first_row_is_free_to_some_degree(self):
        assert guidance_weights(4, 0, 2).tolist()[0] < 1
        assert guidance_weights(4, 0, 2).tolist()[2:] == [0, 0]

    @pytest.mark.parametrize(("delay", "horizon"), [(3, 13), (3, 16), (8, 12)])
    def test_where_nothing_lies_between_it_is_a_step(self, delay: int, horizon: int):
        assert guidance_weights(16, delay, horizon).tolist() == [1.0] * delay + [0.0] * (16 - delay)

    def test_a_delay_of_the_whole_chunk_keeps_it_all(self):
        assert guidance_weights(4, 4, 4).tolist() == [1, 1, 1, 1]
