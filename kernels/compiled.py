"""`compiled`: numba's `njit` for what must run without the interpreter, without allocating, and need no warm-up.

Such code is compiled without numba's memory runtime: an array that would be allocated is an error of the compiler, so
that no test has to look for one. `arrays.py` has what stands in for slice assignment.

What is compiled is kept on disk until anything it uses changes. numba by itself looks only at a function's own file: a
loop that was kept would go on calling the tick it was compiled with, whatever was edited since in the tick's file. Here
every function is kept under one stamp of all sources that compiled code can depend on: the files that use `compiled`,
and what of ours those import.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from numba import njit

import onbeat

_IMPORT: Final = re.compile(rb"^from onbeat\.([\w.]+) import", re.MULTILINE)
_USE: Final = b"@compiled"
AREAS: Final = ("embodiment", "kernels", "drivers", "calibration", "runtime")


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, for the types of its arguments; the calling thread lets go of the interpreter."""
    options: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}
    dispatcher: Any = njit(**options)(function)
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if cache_file is not None and STAMP:
        cache_file._source_stamp = STAMP  # to be deleted when numba itself follows what a function calls
    return dispatcher


def stamp_sources(roots: Iterable[Path]) -> str:
    """A digest of `compiled_sources`; "" for none."""
    sources = compiled_sources(roots)
    return hashlib.sha256(b"".join(sources[name] for name in sorted(sources))).hexdigest() if sources else ""


def compiled_sources(roots: Iterable[Path]) -> dict[str, bytes]:
    """Module -> text of the files of the areas below `roots` that use `compiled`, and of what those import."""
    paths = [(root, path) for root in roots for area in AREAS for path in (root / area).glob("**/*.py")]
    texts = {".".join(path.relative_to(root).with_suffix("").parts): path.read_bytes() for root, path in paths}
    pending, found = [name for name, text in texts.items() if _USE in text], dict[str, bytes]()
    while pending:
        name = pending.pop()
        if name in texts and name not in found:
            found[name] = texts[name]
            pending += [module.decode() for module in _IMPORT.findall(texts[name])]
    return found


def _roots() -> Iterable[Path]:
    """Where the areas lie; the front door's own folder holds them when installed, and the one above in a checkout."""
    return [Path(root) for root in onbeat.__path__]


STAMP: Final = stamp_sources(_roots())
