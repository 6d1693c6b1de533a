"""What exactly ran: versions, the commit of the checkout, the hash of the bundle."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import onbeat
from onbeat.runtime.bundle import MANIFEST_FILE

TIMED_PACKAGES = ("numpy", "numba", "onnxruntime", "pillow", "pyserial", "tokenizers", "mujoco")


def versions() -> dict[str, str]:
    """Python, Onbeat, the kernel, and the installed packages that a timing or a result may depend on."""
    own = {"python": platform.python_version(), "onbeat": onbeat.__version__, "kernel": platform.release()}
    installed = {name: version for name in TIMED_PACKAGES if (version := _version(name)) is not None}
    return {**own, "machine": platform.machine(), **installed}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+" when files differ from it; None outside one."""
    root = Path(onbeat.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return commit and commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def bundle_hash(folder: Path) -> str | None:
    """sha256 of the manifest, which names the hash of every other file; None when there is no manifest any more."""
    try:
        return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
    except OSError:
        return None
