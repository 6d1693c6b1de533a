"""The identity of a checkpoint folder: one hash over the files that decide what the policy does."""

import hashlib
from pathlib import Path

from onbeat.runtime.bundle import hash_file

FOLDERS = (".", "experiment_cfg")
SUFFIXES = (".safetensors", ".json", ".txt")


def digest_checkpoint(folder: Path) -> str:
    """sha256 over the names and hashes of weights, configuration, tokenizer and statistics, sorted by name."""
    files = [path for sub in FOLDERS for path in (folder / sub).glob("*") if path.is_file() and path.suffix in SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()
