import json
from pathlib import Path

import numpy as np
import pytest

from onbeat.embodiment.metadata import (
    AmbiguousVariant,
    MetadataError,
    check_statistics,
    load_statistics,
    measure,
    save_statistics,
)
from onbeat.embodiment.schema import load_embodiment

CHECKPOINT = Path(__file__).parents[1] / "golden" / "ckpt_a1" / "checkpoint"


def entry(low: float, **more: object) -> dict[str, object]:
    known = {"min": [low], "max": [low + 2]}
    return {"statistics": {"state": {"gripper": known}, "action": {"gripper": known}}, **more}


MERGED = {"kitchen": entry(0)}
VARIANTS = {
    "kitchen": entry(0),
    "kitchen_variants": {"cup": entry(1, stats_level="task"), "arm": entry(2, stats_level="embodiment")},
}
ONLY_VARIANTS = {"kitchen_variants": VARIANTS["kitchen_variants"]}
NESTED = {"kitchen": {"cup": entry(1), "plate": entry(2)}}
ONE_NESTED = {"kitchen": {"cup": entry(1)}}


def write(folder: Path, document: object, name: str = "kitchen") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_metadata.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("document", [VARIANTS, ONLY_VARIANTS, NESTED])
def test_several_sets_and_none_named_is_refused(tmp_path, document):
    with pytest.raises(AmbiguousVariant, match=r"name one variant of .*cup"):
        load_statistics(write(tmp_path, document), "kitchen")


@pytest.mark.parametrize(
    ("document", "variant", "taken", "low"),
    [
        (MERGED, None, "merged", 0),
        (MERGED, "auto", "merged", 0),
        (VARIANTS, "merged", "merged", 0),
        (VARIANTS, "auto", "cup", 1),
        (VARIANTS, "arm", "arm", 2),
        (VARIANTS, "task", "cup", 1),
        (VARIANTS, "embodiment", "arm", 2),
        (ONLY_VARIANTS, "auto", "cup", 1),
        (NESTED, "auto", "cup", 1),
        (NESTED, "plate", "plate", 2),
        (ONE_NESTED, None, "cup", 1),
    ],
)
def test_each_form_gives_the_set_that_is_asked(tmp_path, document, variant, taken, low):
    got = load_statistics(write(tmp_path, document), "kitchen", variant)
    assert got.variant == taken
    np.testing.assert_array_equal(got.action["gripper"]["min"], [low])


@pytest.mark.parametrize(
    ("document", "variant", "says"),
    [
        (VARIANTS, "cups", "did you mean 'cup'"),
        (ONLY_VARIANTS, "merged", "no variant 'merged'"),
        (NESTED, "task", "no variant 'task'"),
        ({"bedroom": entry(0)}, None, "no entry 'kitchen'"),
        ([], None, "no table of data sets"),
        ({"kitchen": {"statistics": {"state": {"gripper": {"min": ["x"]}}}}}, None, "are no numbers"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, document, variant, says):
    with pytest.raises(MetadataError, match=says):
        load_statistics(write(tmp_path, document), "kitchen", variant)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"kitchen": None}, "'kitchen' is NoneType"),
        ({"kitchen": [1]}, "'kitchen' is list"),
        ({"kitchen": {"statistics": None}}, "'statistics' is NoneType"),
        ({"kitchen": {"statistics": []}}, "'statistics' is list"),
        ({"kitchen": {"statistics": {"state": [1]}}}, "state statistics is list"),
        ({"kitchen": {"statistics": {"state": {"gripper": "min"}}}}, "state 'gripper' is str"),
        (MERGED | {"kitchen_variants": None}, "'kitchen_variants' is NoneType"),
        (MERGED | {"kitchen_variants": ["cup"]}, "'kitchen_variants' is list"),
        (MERGED | {"kitchen_variants": {"cup": "statistics"}}, "variant 'cup' is str"),
        ({"kitchen_variants": {"cup": {}}}, "'statistics' is NoneType"),
    ],
)
def test_what_should_be_a_table_and_is_none_is_named(tmp_path, document, says):
    folder = write(tmp_path, document)
    with pytest.raises(MetadataError, match=f"{says}, not a table: copy the file again"):
        load_statistics(folder, "kitchen", "auto")
    with pytest.raises(MetadataError):
        load_statistics(folder, "kitchen", "task")


@pytest.mark.parametrize("variant", [None, "merged", "auto"])
def test_an_old_file_may_call_a_variant_merged(tmp_path, variant):
    got = load_statistics(write(tmp_path, {"kitchen": {"merged": entry(3)}}), "kitchen", variant)
    assert (got.variant, got.state["gripper"]["min"]) == ("merged", 3)


def test_broken_json_is_named(tmp_path):
    (tmp_path / "kitchen_metadata.json").write_text('{"kitchen": ')
    with pytest.raises(MetadataError, match="no readable JSON"):
        load_statistics(tmp_path, "kitchen")


def test_which_file(tmp_path):
    with pytest.raises(MetadataError, match="holds statistics of none"):
        load_statistics(tmp_path)
    write(tmp_path / "experiment_cfg", MERGED)
    assert load_statistics(tmp_path).state["gripper"]["min"] == 0
    write(tmp_path, {"kitchen": entry(5)})
    assert load_statistics(tmp_path).state["gripper"]["min"] == 5  # the root comes before experiment_cfg
    write(tmp_path, {"bedroom": entry(7)}, "bedroom")
    with pytest.raises(MetadataError, match="name one data set"):
        load_statistics(tmp_path)
    with pytest.raises(MetadataError, match="did you mean 'kitchen'"):
        load_statistics(tmp_path, "kitchn")


def test_a_recorded_checkpoint():
    got = load_statistics(CHECKPOINT, "libero_posttrain", "auto")
    assert got.variant == "libero_spatial"
    assert got.state["libero_gripper_position"]["q99"].shape == (2,)
    with pytest.raises(AmbiguousVariant):
        load_statistics(CHECKPOINT, "libero_posttrain")


@pytest.mark.parametrize("variant", ["merged", "cup"])
def test_one_set_survives_being_saved(tmp_path, variant):
    taken = load_statistics(write(tmp_path / "whole", VARIANTS), "kitchen", variant)
    (tmp_path / "alone").mkdir()
    save_statistics(taken, tmp_path / "alone")
    again = load_statistics(tmp_path / "alone")  # nothing is left to choose
    assert (again.dataset, again.variant) == ("kitchen", variant)
    np.testing.assert_array_equal(again.state["gripper"]["max"], taken.state["gripper"]["max"])


@pytest.mark.parametrize("low", [[0.0, 1.0], [float("nan")], None])
def test_statistics_of_another_robot_are_refused(tmp_path, low):
    joints = {"min": [0.0] * 5, "max": [1.0] * 5}
    gripper = {"max": [1.0]} if low is None else {"min": low, "max": [1.0]}
    keys = {"arm_joints": joints, "gripper": gripper}
    document = {"kitchen": {"statistics": {"state": keys, "action": keys}}}
    with pytest.raises(MetadataError, match="'min' of state 'gripper'"):
        check_statistics(load_statistics(write(tmp_path, document)), load_embodiment("so101"))


def test_measured_by_hand():
    got = measure(np.array([[1.0, 0.0], [3.0, 0.0]]))
    assert {name: values[0] for name, values in got.items()} == pytest.approx(
        {"min": 1, "max": 3, "mean": 2, "std": 1, "q01": 1.02, "q99": 2.98}
    )
    assert got["std"][1] == 0
