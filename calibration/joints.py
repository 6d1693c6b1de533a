"""Where each joint of one particular arm has its zero, which way it turns, and which servo moves it: a TOML file.

    [shoulder_pan]
    servo_id = 1
    zero_steps = 2048      # servo step at 0 rad
    direction = 1          # -1 when steps grow against the joint
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from onbeat.drivers.feetech.device import JointCalibration
from onbeat.drivers.feetech.tables import MAX_ID
from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.slots import suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STEPS_PER_TURN = 4096
ALLOWED = {
    "servo_id": range(MAX_ID + 1),
    "zero_steps": range(STEPS_PER_TURN),
    "direction": (-1, 1),
}
FACTORY = Path(__file__).parent / "so101.toml"


class CalibrationError(OnbeatError):
    """A calibration file that cannot be read, or does not describe this robot's joints."""


def load_joints(path: Path, joints: Sequence[str]) -> dict[str, JointCalibration]:
    """The calibration of every joint, in the order of `joints`. Raises CalibrationError that names file and joint."""
    document = _read(path)
    unknown = [name for name in document if name not in joints]
    if unknown:
        raise CalibrationError(f"{path}: there is no joint '{unknown[0]}': {suggest(unknown[0], joints)}")
    missing = [joint for joint in joints if joint not in document]
    if missing:
        raise CalibrationError(f"{path}: joint '{missing[0]}' is missing: add a table [{missing[0]}]")
    loaded = {joint: _joint(document[joint], f"{path}: {joint}") for joint in joints}
    _check_servos_apart(loaded, path)
    return loaded


def save_joints(path: Path, joints: Mapping[str, JointCalibration]) -> None:
    """Write a file that `load_joints` reads back equal."""
    tables = [_table(name, joint) for name, joint in joints.items()]
    path.write_text("\n".join(tables), encoding="utf-8")


def _table(name: str, joint: JointCalibration) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in asdict(joint).items())


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}): give a calibration file's path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is no TOML file ({error}): mend that place, or start from {FACTORY}") from None


def _joint(table: Any, where: str) -> JointCalibration:
    names = [field.name for field in fields(JointCalibration)]
    if not isinstance(table, dict):
        raise CalibrationError(f"{where} is not a table: write it as [joint] with {', '.join(names)}")
    unknown = [name for name in table if name not in names]
    if unknown:
        raise CalibrationError(f"{where}: unknown '{unknown[0]}': {suggest(unknown[0], names)}")
    for name in names:
        if name not in table:
            raise CalibrationError(f"{where}: '{name}' is missing: add it")
        if type(table[name]) is not int or table[name] not in ALLOWED[name]:
            raise CalibrationError(f"{where}: {name} = {table[name]!r}: it must be {_allowed_text(name)}")
    return JointCalibration(**table)


def _allowed_text(name: str) -> str:
    values = ALLOWED[name]
    return "1 or -1" if name == "direction" else f"a whole number from {values[0]} to {values[-1]}"


def _check_servos_apart(joints: Mapping[str, JointCalibration], path: Path) -> None:
    owner: dict[int, str] = {}
    for name, joint in joints.items():
        if joint.servo_id in owner:
            raise CalibrationError(
                f"{path}: {owner[joint.servo_id]} and {name} both have servo_id {joint.servo_id}: give each its own"
            )
        owner[joint.servo_id] = name
