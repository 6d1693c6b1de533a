"""What a servo bus carries: refusals with figures, bytes as they are really sent, and time-outs that end in a tick."""

import numpy as np
import pytest

from onbeat.drivers.feetech.device import BusSettings
from onbeat.drivers.feetech.pace import TICK_NS, BusPace, RateTooHigh
from onbeat.drivers.feetech.protocol import OVERHEAD, put_goals, put_request
from onbeat.drivers.feetech.tables import STATE_ADDRESS, STATE_SIZE

SO101 = BusPace(6, 1_000_000)


def test_a_rate_the_wire_cannot_carry_is_refused_with_figures():
    with pytest.raises(
        RateTooHigh, match=r"500 Hz leaves 2000 us.*124 bytes.*6 servos take 1240 us.*loop_rate_hz to 364"
    ):
        SO101.check(500)


@pytest.mark.parametrize(("baud_rate", "rate_hz"), [(115_200, 100), (500_000, 300)])
def test_so_is_one_that_a_slow_bus_cannot_carry(baud_rate: int, rate_hz: float):
    with pytest.raises(RateTooHigh):
        BusPace(6, baud_rate).check(rate_hz)


def test_the_highest_rate_passes_its_own_check():
    SO101.check(SO101.highest_rate_hz)
    SO101.check(200)


@pytest.mark.parametrize("servos", [1, 6, 12])
def test_the_bytes_are_those_of_the_packets(servos: int):
    out, ids = np.zeros(256, np.uint8), np.arange(1, servos + 1, dtype=np.uint8)
    end = put_goals(out, 0, ids, np.zeros(servos), np.full(servos, 2048), np.ones(servos, np.int64))
    end = put_request(out, end, ids, STATE_ADDRESS, STATE_SIZE)
    assert BusPace(servos, 1_000_000).bytes == end + servos * (OVERHEAD + STATE_SIZE)


@pytest.mark.parametrize("rate_hz", [10, 50, 100, 200, 300])
def test_an_exchange_that_fails_ends_inside_its_tick(rate_hz: float):
    settings = SO101.fit(BusSettings(retries=2), rate_hz)
    longest_ms = (settings.timeout_ms + settings.settle_ms) * (1 + settings.retries)
    assert longest_ms <= 1000 / rate_hz - TICK_NS / 1e6 + 1e-9
    assert settings.timeout_ms * 1e6 > SO101.wire_ns
    assert 0 <= settings.retries <= 2


def test_there_is_time_for_retries_where_the_period_is_long():
    assert [SO101.fit(BusSettings(retries=2), rate).retries for rate in (200, 50, 10)] == [0, 1, 2]
