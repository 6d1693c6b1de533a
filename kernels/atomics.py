"""Loads and stores that other threads see in order, and the sequence counter that keeps a reader from torn values.

Everything here works on int64 arrays, from compiled code that holds no lock and from Python alike. An acquire load
sees all that was written before the release store whose value it reads.

A *seqlock* is one such word. The one writer makes it odd, writes what it guards with plain stores, and makes it even
again; a reader copies between two looks at the word and keeps the copy only when both show the same even number:

    begin_write(word)                    begun = begin_read(word)
    values[:] = ...                      copy[:] = values
    end_write(word)                      if not is_intact(word, begun): ...  # the copy means nothing

A reader must not wait for a writer that it may have interrupted: after a few tries it goes on with what it had.
Source: H. Boehm, Can seqlocks get along with programming language memory models?, MSPC 2012, section 4.
"""

from collections.abc import Callable
from typing import Any, Final

from numba import types
from numba.core.cgutils import get_item_pointer
from numba.core.typing.templates import Signature
from numba.extending import intrinsic as _untyped_intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from onbeat.kernels.compiled import compiled

_WORD_BYTES: Final = 8
intrinsic: Any = _untyped_intrinsic  # what it makes is called without the typing context

Lowering = tuple[Signature, Callable[..., Any]]


def _pointer(context: Any, builder: Any, signature: Signature, args: Any) -> Any:
    """Where element args[1] of the array args[0] lies."""
    array_type = signature.args[0]
    array = make_array(array_type)(context, builder, args[0])
    return get_item_pointer(context, builder, array_type, array, [args[1]], wraparound=False)


def _check_words(words: Any) -> None:
    assert isinstance(words, types.Array), words
    assert words.dtype == types.int64, words
    assert words.ndim == 1, words


@intrinsic
def _load_acquire(typing_context: Any, words: Any, index: Any) -> Lowering:  # noqa: ARG001
    _check_words(words)

    def lower(context: Any, builder: Any, signature: Signature, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, args), "acquire", _WORD_BYTES)

    return types.int64(words, types.intp), lower


@intrinsic
def _store_release(typing_context: Any, words: Any, index: Any, value: Any) -> Lowering:  # noqa: ARG001
    _check_words(words)

    def lower(context: Any, builder: Any, signature: Signature, args: Any) -> Any:
        builder.store_atomic(args[2], _pointer(context, builder, signature, args), "release", _WORD_BYTES)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.int64), lower


@intrinsic
def _fence(typing_context: Any) -> Lowering:  # noqa: ARG001
    def lower(context: Any, builder: Any, signature: Signature, args: Any) -> Any:  # noqa: ARG001
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), lower


@compiled
def load_acquire(words: NDArray[Any], index: int) -> int:
    """words[index], and with it all that its writer had written before it. words: (N,) int64."""
    return _load_acquire(words, index)


@compiled
def store_release(words: NDArray[Any], index: int, value: int) -> None:
    """words[index] = value, seen by others after all that was written before. words: (N,) int64."""
    _store_release(words, index, value)


@compiled
def fence() -> None:
    """What stands before stays before, what stands after stays after, loads and stores alike."""
    _fence()


@compiled
def begin_write(word: NDArray[Any]) -> None:
    """Open a write of what `word` (1,) int64 guards. There is one writer."""
    _store_release(word, 0, word[0] | 1)
    _fence()


@compiled
def end_write(word: NDArray[Any]) -> None:
    """Close the write: readers that begin from now on see it whole."""
    _store_release(word, 0, word[0] + 1)


@compiled
def begin_read(word: NDArray[Any]) -> int:
    """What to hand to `is_intact` after the copy."""
    return _load_acquire(word, 0)


@compiled
def is_intact(word: NDArray[Any], begun: int) -> bool:
    """Whether no write was under way since `begin_read` returned `begun`: the copy made in between may be used."""
    _fence()
    return begun & 1 == 0 and _load_acquire(word, 0) == begun
