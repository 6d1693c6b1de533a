"""The base of every error a user can cause or mend."""


class OnbeatError(Exception):
    """Wrong input or environment. The text says what is wrong and ends with what to do about it.

    Each area derives one class per thing a caller treats differently. The front door prints the text and exits 1.
    """
