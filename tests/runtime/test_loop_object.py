"""What the machine code of the loop can call at all: read from the object file that the compiler kept of it."""

import struct
from collections import defaultdict
from typing import Any

import pytest
from numba import types

from onbeat.kernels.compiled import compiled
from onbeat.runtime.loop import compile_ahead, run_loop
from onbeat.runtime.robots import load_robot

WRAPPERS = ("_ZN7cpython", "cfunc.")  # how Python enters and leaves: before the first tick, and after the last
CALLS = {  # the clock, the wire, sine and cosine of the workspace; none of them takes a lock or memory
    *("clock_gettime", "clock_nanosleep", "ppoll", "read", "write", "__errno_location"),
    *("memset", "sincos", "sin", "cos"),
}
SECTION, SYMBOL, RELOCATION = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ"), struct.Struct("<QQq")
SYMBOLS, RELOCATIONS, FUNCTION = 2, 4, 2


def kept_object(dispatcher: Any) -> bytes:
    """The ELF file of the newest version of a function that `compiled` has put on disk."""
    signature = dispatcher.signatures[-1]
    cache = dispatcher._cache
    (_, kind, payload), *_ = cache._cache_file.load(cache._index_key(signature, dispatcher.targetctx.codegen()))
    assert kind == "object"
    return payload[0]


def calls_of(elf: bytes) -> dict[str, set[str]]:
    """Function -> names from outside that it refers to (System V ABI, ELF-64, little endian)."""
    assert elf[:6] == b"\x7fELF\x02\x01", "a 64-bit little-endian machine"
    (offset,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    sections = [SECTION.unpack_from(elf, offset + k * size) for k in range(count)]
    table = next(section for section in sections if section[1] == SYMBOLS)
    names = elf[sections[table[6]][4] :]
    symbols = list(SYMBOL.iter_unpack(elf[table[4] : table[4] + table[5]]))
    found: dict[str, set[str]] = defaultdict(set)
    for section in sections:
        if section[1] != RELOCATIONS:
            continue
        for at, info, _ in RELOCATION.iter_unpack(elf[section[4] : section[4] + section[5]]):
            target = symbols[info >> 32]
            if target[3] == 0:  # defined elsewhere
                for caller in symbols:
                    is_in = caller[4] <= at < caller[4] + caller[5] and caller[3] == section[7]
                    if caller[1] & 15 == FUNCTION and is_in:
                        found[_name(names, caller)].add(_name(names, target))
    return found


def _name(names: bytes, symbol: tuple[int, ...]) -> str:
    return names[symbol[0] : names.index(b"\0", symbol[0])].decode()


def outside_calls(dispatcher: Any) -> set[str]:
    """Of everything but the wrappers; there is something to look at."""
    of_function = {name: c for name, c in calls_of(kept_object(dispatcher)).items() if not name.startswith(WRAPPERS)}
    assert of_function
    return {call for calls in of_function.values() for call in calls}


def test_the_loop_calls_the_clock_and_the_wire_and_nothing_that_locks_or_allocates():
    compile_ahead(load_robot("so101-twin").limits)
    calls = outside_calls(run_loop)
    assert {"clock_nanosleep", "ppoll", "read", "write"} <= calls, "it was looked at"
    assert calls <= CALLS


_malloc: Any = types.ExternalFunction("malloc", types.uintp(types.uintp))
_lock: Any = types.ExternalFunction("pthread_mutex_lock", types.int32(types.uintp))


@compiled
def allocate(words):
    words[0] = _malloc(words[0])


@compiled
def lock(words):
    words[0] = _lock(words[0])


@pytest.mark.parametrize(("careless", "name"), [(allocate, "malloc"), (lock, "pthread_mutex_lock")])
def test_what_would_lock_or_allocate_is_seen(careless: Any, name: str):
    careless.compile((types.uintp[::1],))
    assert outside_calls(careless) - CALLS == {name}
