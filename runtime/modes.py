"""How a new chunk joins the old one. The checkpoint decides, unless the command line does.

sync     the robot executes its horizon, stops, looks, infers, moves on
async    the old chunk runs during inference; the new one takes over on its path and fades in
locked   async, and the policy keeps the rows that will have run by then: for checkpoints trained to continue them
guided   async, and the sampler is pulled towards what is committed: for the others, where the bundle can
"""

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.engine import PolicySpec

SYNC, ASYNC, LOCKED, GUIDED = "sync", "async", "locked", "guided"
MODES = (SYNC, ASYNC, LOCKED, GUIDED)


class ModeError(OnbeatError):
    """A mode that the policy was not made for."""


def choose_mode(spec: PolicySpec, asked: str = "", *, allow_untrained_prefix: bool = False) -> str:
    """The mode asked for, or with "" the best that the policy can. Raises ModeError for one that it cannot."""
    if asked not in ("", *MODES):
        raise ModeError(f"unknown mode '{asked}': choose from {', '.join(MODES)}")
    if asked == GUIDED and not spec.guidance:
        raise ModeError("this bundle's flow graph takes no guidance: export the checkpoint again, or use --mode async")
    if asked == LOCKED and spec.trained_delay == 0 and not allow_untrained_prefix:
        raise ModeError(
            "this checkpoint was not trained to continue a prefix: use --mode guided or async, train with a simulated "
            "delay, or insist with --allow-untrained-prefix"
        )
    return asked or (LOCKED if spec.trained_delay else GUIDED if spec.guidance else ASYNC)
