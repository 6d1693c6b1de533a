"""Words shared between threads: wrong arrays are refused, and no reader ever keeps half of a write."""

import threading

import numpy as np
import pytest
from numba import njit

from onbeat.kernels.atomics import begin_read, begin_write, end_write, is_intact, load_acquire, store_release

WRITES = 1_000_000
BEAT = 64  # values per write: wide enough that a reader is caught in the middle


@pytest.mark.parametrize("words", [np.zeros(2), np.zeros(2, np.int32), np.zeros((2, 2), np.int64)])
def test_only_words_can_be_shared(words: np.ndarray):
    with pytest.raises(AssertionError):
        load_acquire(words, 0)


def test_a_store_is_loaded():
    words = np.arange(4)
    store_release(words, 2, -7)
    assert load_acquire(words, 2) == -7
    assert words.tolist() == [0, 1, -7, 3]


class TestSeqlock:
    def test_a_read_during_a_write_is_torn(self):
        word = np.zeros(1, np.int64)
        before = begin_read(word)
        begin_write(word)
        during = begin_read(word)
        assert not is_intact(word, before)
        assert not is_intact(word, during)
        end_write(word)
        assert not is_intact(word, during)
        assert not is_intact(word, before)
        assert is_intact(word, begin_read(word))

    def test_a_writer_that_died_half_way_leaves_no_intact_value_until_the_next(self):
        word = np.zeros(1, np.int64)
        begin_write(word)
        begin_write(word)
        assert not is_intact(word, begin_read(word))
        end_write(word)
        assert is_intact(word, begin_read(word))

    def test_two_threads_never_see_half_a_write(self):
        word, values, torn = np.zeros(1, np.int64), np.zeros(BEAT, np.int64), np.zeros(1, np.int64)
        writer = threading.Thread(target=write_many, args=(word, values, WRITES))
        writer.start()
        kept, lost = read_many(word, values, torn, WRITES)
        writer.join()
        assert (kept > 0, lost, values[0]) == (True, 0, WRITES)


@njit(nogil=True)
def write_many(word, values, writes):
    for k in range(1, writes + 1):
        begin_write(word)
        for i in range(values.size):
            values[i] = k
        end_write(word)


@njit(nogil=True)
def read_many(word, values, torn, last):
    """(copies kept, copies kept though half written); torn: (1,) copies refused."""
    copy, kept, half = np.zeros_like(values), 0, 0
    while copy[0] != last:
        begun = begin_read(word)
        for i in range(values.size):
            copy[i] = values[i]
        if is_intact(word, begun):
            kept += 1
            half += 1 if (copy != copy[0]).any() else 0
        else:
            torn[0] += 1
            copy[0] = 0
    return kept, half
