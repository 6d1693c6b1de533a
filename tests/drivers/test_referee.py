"""Who says that a cube was lifted."""

import pytest

from onbeat.drivers.twin.referee import HOLD_NS, LIFT_M, Referee

TIMEOUT_NS = 12_000_000_000


@pytest.fixture
def referee() -> Referee:
    referee = Referee(TIMEOUT_NS)
    assert referee.start_attempt(0) == "attempt_started"
    return referee


def test_before_the_first_attempt_nothing_is_judged() -> None:
    assert Referee(TIMEOUT_NS).judge(10 * TIMEOUT_NS, 0.2) is None


def test_lifted_for_long_enough(referee: Referee) -> None:
    assert referee.judge(1000, LIFT_M) is None
    assert referee.judge(1000 + HOLD_NS - 1, 0.06) is None
    assert referee.judge(1000 + HOLD_NS, 0.06) == "lifted"
    assert (referee.attempt, referee.successes, referee.failures) == (1, 1, 0)


def test_a_drop_starts_the_hold_anew(referee: Referee) -> None:
    referee.judge(0, 0.06)
    assert referee.judge(HOLD_NS - 1, LIFT_M - 1e-9) is None
    assert referee.judge(HOLD_NS, 0.06) is None
    assert referee.judge(2 * HOLD_NS - 1, 0.06) is None
    assert referee.judge(2 * HOLD_NS, 0.06) == "lifted"


def test_time_runs_out(referee: Referee) -> None:
    assert referee.judge(TIMEOUT_NS - 1, 0.0) is None
    assert referee.judge(TIMEOUT_NS, 0.0) == "timed_out"
    assert (referee.successes, referee.failures) == (0, 1)


def test_a_lift_at_the_last_moment_counts(referee: Referee) -> None:
    referee.judge(TIMEOUT_NS - HOLD_NS, 0.06)
    assert referee.judge(TIMEOUT_NS, 0.06) == "lifted"


def test_the_next_attempt_starts_afresh(referee: Referee) -> None:
    referee.judge(0, 0.06)
    referee.judge(HOLD_NS, 0.06)
    referee.start_attempt(HOLD_NS)
    assert referee.judge(HOLD_NS + 1, 0.06) is None
    assert referee.judge(HOLD_NS + TIMEOUT_NS, 0.0) == "timed_out"
    assert referee.attempt == 2
