"""A log names the bits of its faults, so that a table with other rows reads them right."""

import numpy as np

from onbeat.runtime.faults import Fault
from onbeat.runtime.flight.fault_bits import NAMES, in_this_version

TICK = np.dtype([("faults", np.int64), ("seen", np.int64), ("level", np.int64)])


def ticks(*bits: int) -> np.ndarray:
    return np.array([(bit, bit, 3) for bit in bits], TICK)


def test_bits_of_another_table_go_where_this_one_has_them():
    names = ["BUS_DEAD", "A_FAULT_OF_TOMORROW", "CHUNK_LATE"]
    read = in_this_version(ticks(0b101, 0b010), {"faults": names})
    both = 1 << Fault.BUS_DEAD | 1 << Fault.CHUNK_LATE
    assert read["faults"].tolist() == read["seen"].tolist() == [both, 0]
    assert read["level"].tolist() == [3, 3]


def test_bits_of_this_table_stay():
    recorded = ticks(*(1 << fault for fault in Fault))
    assert np.array_equal(in_this_version(recorded, {"faults": NAMES}), recorded)


def test_every_fault_has_a_bit_of_its_own_in_an_int64():
    assert [Fault(bit).name for bit in range(len(NAMES))] == NAMES
    assert len(NAMES) < 63
