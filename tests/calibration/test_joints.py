"""Calibration files: everything that can be wrong with one is named, and what is saved is read back."""

from pathlib import Path

import pytest

from onbeat.calibration.joints import FACTORY, CalibrationError, load_joints, save_joints
from onbeat.drivers.feetech.device import JointCalibration

JOINTS = ("pan", "grip")
GOOD = "[pan]\nservo_id = 1\nzero_steps = 2048\ndirection = 1\n[grip]\nservo_id = 2\nzero_steps = 100\ndirection = -1\n"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[grip]", "[gripp]", "did you mean 'grip'"),
        ("[grip]", "[pan", "is no TOML file"),
        ("zero_steps = 100", "zero = 100", "did you mean 'zero_steps'"),
        ("zero_steps = 100\n", "", "'zero_steps' is missing"),
        ("zero_steps = 100", "zero_steps = 4096", "from 0 to 4095"),
        ("zero_steps = 100", "zero_steps = 100.5", "whole number"),
        ("direction = -1", "direction = 0", "1 or -1"),
        ("direction = -1", "direction = true", "1 or -1"),
        ("servo_id = 2", "servo_id = 1", "pan and grip both have servo_id 1"),
        ("servo_id = 2", "servo_id = 300", "from 0 to 253"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, old: str, new: str, complaint: str):
    path = tmp_path / "arm.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(CalibrationError, match=complaint) as caught:
        load_joints(path, JOINTS)
    assert "arm.toml" in str(caught.value)


def test_a_missing_joint_is_named(tmp_path: Path):
    path = tmp_path / "arm.toml"
    path.write_text(GOOD)
    with pytest.raises(CalibrationError, match=r"'elbow' is missing: add a table \[elbow\]"):
        load_joints(path, ("pan", "elbow", "grip"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CalibrationError, match=r"nowhere\.toml cannot be read"):
        load_joints(tmp_path / "nowhere.toml", JOINTS)


def test_what_is_saved_is_read_back_in_the_robots_order(tmp_path: Path):
    joints = {"grip": JointCalibration(2, 100, -1), "pan": JointCalibration(1)}
    save_joints(tmp_path / "arm.toml", joints)
    loaded = load_joints(tmp_path / "arm.toml", JOINTS)
    assert loaded == joints
    assert list(loaded) == ["pan", "grip"]


def test_the_factory_file_fits_the_embodiment():
    from onbeat.embodiment.schema import load_embodiment

    joints = load_joints(FACTORY, load_embodiment("so101").joints)
    assert [joint.servo_id for joint in joints.values()] == [1, 2, 3, 4, 5, 6]
