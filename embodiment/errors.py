"""The base of every error a user can cause or mend."""

import sys
from collections.abc import Callable


class OnbeatError(Exception):
    """Wrong input or environment. The text says what is wrong and ends with what to do about it.

    Each area derives one class per thing a caller treats differently. The front door prints the text and exits 1.
    """


def run_module(name: str, main: Callable[[], int]) -> int:
    """A command that is a module, `python -m NAME`: a user's error becomes its text and exit code 1."""
    try:
        return main()
    except OnbeatError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
