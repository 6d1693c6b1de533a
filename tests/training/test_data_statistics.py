"""Statistics in one pass: NumPy's own, in memory with a bound, and as the published files carry them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.embodiment.metadata import MERGED, AmbiguousVariant, check_statistics, load_statistics, measure
from onbeat.embodiment.schema import load_embodiment
from onbeat.training.data.columns import read_columns
from onbeat.training.data.layout import Feature
from onbeat.training.data.reader import open_dataset
from onbeat.training.data.robot_data import RobotData
from onbeat.training.data.statistics import Extremes, Measure, measure_data
from onbeat.training.data.writer import DatasetWriter

SO101 = load_embodiment("so101")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=6),
    slack=st.integers(0, 900),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "few", "large"]),
)
def test_one_pass_gives_numpys_statistics(rows: int, cuts: list[int], slack: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(size=(rows, 3)),
        "few": rng.integers(0, 3, (rows, 3)).astype(np.float64),  # many equal values
        "large": 1e8 + rng.normal(size=(rows, 3)),  # where a naive sum of squares has no digits left
    }[kind]
    found = Measure(rows + slack)
    for part in np.split(values, sorted(cut for cut in cuts if cut < rows)):
        if len(part):
            found.add(part)
    for name, wanted in measure(values).items():
        assert found.result()[name] == pytest.approx(wanted, rel=1e-12, abs=1e-9 if kind != "large" else 1e-6), name


def test_single_precision_is_kept_exact() -> None:
    values = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
    found = Measure(len(values))
    for part in np.array_split(values, 7):
        found.add(part)
    wanted = measure(values.astype(np.float64))
    assert all(np.allclose(found.result()[name], wanted[name], rtol=1e-12, atol=1e-12) for name in wanted)


def test_memory_is_bounded_by_two_per_cent_of_a_column() -> None:
    rows = 50_000
    found, most = Extremes(rows // 100 + 2), 0
    for part in np.array_split(np.random.default_rng(0).normal(size=(rows, 1)), 100):
        found.add(part)
        most = max(most, found._held)
    assert most <= 2 * (rows // 100 + 2)
    assert len(found.sorted()) == rows // 100 + 2


def write_arm(folder: Path, tasks: list[list[str]], seed: int = 0) -> Path:
    """A dataset of the SO-101 without cameras, one episode per list of tasks (one task a row)."""
    rng = np.random.default_rng(seed)
    features = {"observation.state": Feature("float32", (6,)), "action": Feature("float32", (6,))}
    with DatasetWriter(folder, fps=10, features=features) as writer:
        for number, told in enumerate(tasks):
            shape = (len(told), 6)
            columns = {name: rng.normal(number, 1, shape).astype(np.float32) for name in features}
            writer.add_episode(columns, told)
    return folder


def open_arm(folder: Path) -> RobotData:
    dataset = open_dataset(folder)
    return RobotData(dataset, SO101, read_columns({"views": {}}, SO101, (), dataset.info.features, "here"))


def test_a_dataset_is_measured_whole_and_by_task(tmp_path: Path) -> None:
    data = open_arm(write_arm(tmp_path / "arm", [["lift"] * 9, ["lift"] * 4 + ["drop"] * 8, ["drop"] * 30]))
    measured = measure_data("arm", [data], chunk=4)
    actions = np.concatenate([data.dataset.numbers(e, "action") for e in range(3)]).astype(np.float64)
    states = np.concatenate([data.dataset.numbers(e, "observation.state") for e in range(3)]).astype(np.float64)
    lifts = np.r_[0:13]
    for name, wanted in measure(actions[:, :5]).items():
        assert measured.merged.action["arm_joints"][name] == pytest.approx(wanted, rel=1e-12), name
    for name, wanted in measure(states[lifts, 5:]).items():
        assert measured.variants["lift"].state["gripper"][name] == pytest.approx(wanted, rel=1e-12), name
    assert measured.levels == {"drop": "task", "lift": "task"}


def test_some_episodes_may_be_measured_alone(tmp_path: Path) -> None:
    data = open_arm(write_arm(tmp_path / "arm", [["lift"] * 9, ["drop"] * 30]))
    measured = measure_data("arm", [data], chunk=4, episodes=[[1]])
    wanted = measure(data.dataset.numbers(1, "action").astype(np.float64)[:, 5:])
    assert measured.merged.action["gripper"]["q99"] == pytest.approx(wanted["q99"], rel=1e-12)
    assert measured.variants == {}


def test_what_is_saved_is_what_checkpoints_carry(tmp_path: Path) -> None:
    data = open_arm(write_arm(tmp_path / "arm", [["lift"] * 9, ["drop"] * 30]))
    measured = measure_data("arm", [data], chunk=4)
    path = measured.save(tmp_path)
    assert path.name == "arm_metadata.json"
    with pytest.raises(AmbiguousVariant):
        load_statistics(tmp_path, "arm")
    for variant, known in {MERGED: measured.merged, **measured.variants}.items():
        loaded = load_statistics(tmp_path, "arm", variant)
        check_statistics(loaded, SO101)
        assert loaded.variant == variant
        for side in ("state", "action"):
            for key, figures in getattr(known, side).items():
                for name, values in figures.items():
                    assert np.array_equal(getattr(loaded, side)[key][name], values)
    assert load_statistics(tmp_path, "arm", "task").variant == "drop"
    entry = json.loads(path.read_text())["arm"]
    assert entry["embodiment_tag"] == "so101"
    assert entry["modalities"]["action"]["arm_joints"] == {
        "absolute": True,
        "rotation_type": None,
        "shape": [5],
        "continuous": True,
    }


def test_several_robots_are_variants_of_the_embodiment(tmp_path: Path) -> None:
    first = open_arm(write_arm(tmp_path / "one", [["lift"] * 9]))
    other = load_embodiment(_renamed(tmp_path))
    second = RobotData(open_dataset(write_arm(tmp_path / "two", [["lift"] * 20], seed=1)), other, first.columns)
    measured = measure_data("both", [first, second], chunk=4)
    measured.save(tmp_path)
    assert measured.levels == {"so101": "embodiment", "so102": "embodiment"}
    assert load_statistics(tmp_path, "both", "embodiment").variant == "so101"
    wanted = measure(second.dataset.numbers(0, "action").astype(np.float64)[:, 5:])
    assert measured.variants["so102"].action["gripper"]["max"] == pytest.approx(wanted["max"])


FOUR_JOINTS = (
    ("[0:5]", "[0:4]"),
    (', "wrist_roll"]', "]"),
    (", -2.74385]", "]"),
    (", 2.84121]", "]"),
    ("[3.0, 3.0, 3.0, 3.0, 3.0]", "[3.0, 3.0, 3.0, 3.0]"),
    ("[20.0, 20.0, 20.0, 20.0, 20.0]", "[20.0, 20.0, 20.0, 20.0]"),
)


def test_a_key_of_two_widths_has_no_merged_statistics(tmp_path: Path) -> None:
    first = open_arm(write_arm(tmp_path / "one", [["lift"] * 9]))
    other = load_embodiment(_renamed(tmp_path, *FOUR_JOINTS))
    features = {"observation.state": Feature("float32", (5,)), "action": Feature("float32", (5,))}
    with DatasetWriter(tmp_path / "two", fps=10, features=features) as writer:
        writer.add_episode({name: np.zeros((3, 5), np.float32) for name in features}, "lift")
    columns = read_columns({"views": {}}, other, (), features, "here")
    second = RobotData(open_dataset(tmp_path / "two"), other, columns)
    measured = measure_data("both", [first, second], chunk=4)
    assert set(measured.merged.action) == {"gripper"}
    assert len(measured.variants["so102"].action["arm_joints"]["max"]) == 4
    assert len(measured.variants["so101"].action["arm_joints"]["max"]) == 5


def _renamed(folder: Path, *changes: tuple[str, str]) -> Path:
    """The SO-101's file under another name, its text changed."""
    assert SO101.source is not None
    text = SO101.source.read_text(encoding="utf-8")
    for old, new in changes:
        text = text.replace(old, new)
    path = folder / "so102.toml"
    path.write_text(text, encoding="utf-8")
    return path
