"""`onbeat bench`: what the runtime costs and how it compares, each figure by one command.

onbeat bench loop      lateness and missed ticks, beside other ways to write a control loop
onbeat bench tick      what each step of a tick takes, beside what it may take
onbeat bench seam      what changing from one chunk to the next does to the motion
"""

import importlib
import sys
from collections.abc import Sequence

BENCHES = {
    "loop": ("onbeat.runtime.bench_loop:main", "lateness and missed ticks, beside other ways to write a control loop"),
    "tick": ("onbeat.runtime.bench_tick:main", "what each step of a tick takes, beside what it may take"),
    "seam": ("onbeat.runtime.bench_seam:main", "what changing from one chunk to the next does to the motion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of BENCHES; returns its exit code, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in BENCHES:
        module, function = BENCHES[arguments[0]][0].split(":")
        return getattr(importlib.import_module(module), function)(arguments[1:])
    is_asked = arguments[:1] in (["-h"], ["--help"])
    print(usage(), file=sys.stdout if is_asked else sys.stderr)
    return 0 if is_asked else 2


def usage() -> str:
    """The table of benches."""
    rows = "\n".join(f"  {name:<6} {summary}" for name, (_, summary) in BENCHES.items())
    return f"usage: onbeat bench NAME [--json ...]   (onbeat bench NAME --help: options, defaults, units)\n\n{rows}"
