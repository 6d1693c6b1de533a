"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onbeat.embodiment.errors import OnbeatError


class OutputExists(OnbeatError):
    """Something is already where the result should go."""


@contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the body succeeds, and is removed when it fails.

    replace: an existing target gives way, at the very end. Raises OutputExists before the body otherwise.
    """
    if target.exists() and not replace and (not target.is_dir() or any(target.iterdir())):
        raise OutputExists(f"{target} already exists: name another folder, or pass --replace")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        _sync(staging)
        _take_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring every file to the disk, so that a power cut after the rename cannot leave an empty one."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    staging.rename(target)
    shutil.rmtree(old)
