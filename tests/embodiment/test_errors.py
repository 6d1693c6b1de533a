"""What becomes of a user's error where a module is the command."""

import pytest

from onbeat.embodiment.errors import OnbeatError, run_module


def fails() -> int:
    raise OnbeatError("the port is busy: close the other program")


def test_a_users_error_is_its_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module("onbeat.area.thing", fails) == 1
    assert capsys.readouterr() == ("", "onbeat.area.thing: the port is busy: close the other program\n")


def test_what_the_module_says_is_passed_on_and_other_errors_too() -> None:
    assert run_module("onbeat.area.thing", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_module("onbeat.area.thing", lambda: 1 // 0)
