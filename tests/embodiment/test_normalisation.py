from pathlib import Path

import numpy as np
import pytest

from onbeat.embodiment.normalisation import MODES, STATISTICS, normalise, unnormalise

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "unit_transforms.npz")
KNOWN = {name: GOLDEN[f"norm/stat_{name}"] for name in STATISTICS}
RECORDED = [name for name in GOLDEN.files if name.endswith(("_forward", "_inverse"))]
CONSTANT = {name: np.array([0.2]) for name in STATISTICS} | {"std": np.zeros(1)}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("q99", [-1.0, 0.7, 1.0]), ("min_max", [0.0, 0.0, 0.0]), ("mean_std", [-3.0, 0.7, 5.0])],
)
def test_a_constant_column_has_its_published_rule(mode, expected):
    x = np.array([[-3.0], [0.7], [5.0]])
    np.testing.assert_array_equal(normalise(x, mode, CONSTANT)[:, 0], expected)


def test_q99_clamps_forward_but_not_back():
    bounds = {"q01": np.array([-1.0]), "q99": np.array([3.0])}
    np.testing.assert_array_equal(normalise(np.array([[9.0]]), "q99", bounds), [[1.0]])
    np.testing.assert_array_equal(unnormalise(np.array([[2.0]]), "q99", bounds), [[5.0]])


def test_binary_at_the_threshold_is_off():
    np.testing.assert_array_equal(normalise(np.array([0.5, np.nextafter(0.5, 1)]), "binary", {}), [0.0, 1.0])


@pytest.mark.parametrize("name", RECORDED)
def test_bit_for_bit_as_published(name):
    mode, dtype, direction = name.removeprefix("norm/").rsplit("_", 2)
    transform = normalise if direction == "forward" else unnormalise
    got = transform(GOLDEN["norm/x"].astype(dtype), mode, KNOWN)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, GOLDEN[name])


@pytest.mark.parametrize("mode", [name for name in MODES if name != "binary"])
def test_inside_the_range_the_inverse_undoes(mode):
    varying = {name: values[[0, 1, 3, 4]] for name, values in KNOWN.items()}
    x = np.linspace(varying["q01"], varying["q99"], 9)
    np.testing.assert_allclose(unnormalise(normalise(x, mode, varying), mode, varying), x, atol=1e-15)


def test_every_recorded_mode_exists():
    assert {name.removeprefix("norm/").rsplit("_", 2)[0] for name in RECORDED} == set(MODES)
