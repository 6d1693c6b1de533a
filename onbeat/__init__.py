"""Onbeat: the on-robot runtime for flow-matching vision-language-action policies."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the areas are neighbours of this folder; installed, they are inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "embodiment").is_dir():
    __path__.append(str(_root))
