"""What the figures were taken under: machine, clocks, power mode, temperatures, throttling, load. As JSON and in words.

No figure of latency means much without them, so they stand beside each; what is not known is said to be so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.run_records import MachineRecords

UNKNOWN: Final = "not known here"
PLAIN: Final = ("model", "release", "kernel", "cores", "memory_bytes", "power_mode", "cpu_governor", "gpu_governor")
KINDS: Final = {
    "clocks_hz": ("cpu clock", "gpu clock", "emc clock"),
    "gpu_load_percent": ("gpu load",),
    "temperatures_c": ("temperature",),
    "throttling_share": ("throttling",),
    "throttle_counts": ("over-current", "thermal throttle"),
    "power_w": ("power",),
    "fan_rpm": ("fan",),
}


def conditions(machine: MachineRecords | None) -> dict[str, Any]:
    """What the figures were taken under. None: not known here."""
    if machine is None:
        return dict.fromkeys((*PLAIN, "load", "busy_share", "stolen_share", *KINDS))
    about, samples = machine.about, machine.samples
    return {
        **{name: about.get(name) for name in PLAIN},
        "load": float(np.mean(samples["load"])) if len(samples) else None,
        "busy_share": _share(samples, "busy_ns", about.get("cores")),
        "stolen_share": _share(samples, "stolen_ns", about.get("cores")),
        **{name: _probes(machine, kinds) for name, kinds in KINDS.items()},
    }


def _share(samples: NDArray[np.void], counter: str, cores: int | None) -> float | None:
    """Of all processors' time between the first sample and the last."""
    if len(samples) < 2 or cores is None or samples[counter][0] < 0:
        return None
    span_ns = float(samples["t_ns"][-1] - samples["t_ns"][0])
    return float(samples[counter][-1] - samples[counter][0]) / (span_ns * cores)


def _probes(machine: MachineRecords, kinds: Sequence[str]) -> dict[str, Any] | None:
    """Of every probe of these kinds that ever said something; None when there is none."""
    found = {name: _probe(machine, k, name) for k, name in enumerate(machine.about["probes"]) if name.startswith(kinds)}
    return {name: value for name, value in found.items() if value is not None} or None


def _probe(machine: MachineRecords, k: int, name: str) -> Any:
    """States as the share of samples that throttle, counts as what was added, all else as least, middle and most."""
    values = machine.probes[:, k]
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    unit = machine.about["units"][k]
    if unit == "state":
        return float(np.mean(values > 0))
    if unit == "count":
        return int(values[-1] - values[0])
    low, high = machine.about.get("bounds", {}).get(name, (None, None))
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
        "lowest_allowed": low,
        "highest_allowed": high,
    }


def conditions_words(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) for people: what must stand beside every figure of latency, known or not."""
    cores = f", {values['cores']} processors" if values["cores"] else ""
    return [
        ("machine", f"{values['model'] or UNKNOWN}{cores}"),
        ("power mode", str(values["power_mode"] or UNKNOWN)),
        ("clocks", _clock_words(values)),
        ("temperature", _hottest_words(values["temperatures_c"])),
        ("throttling", _throttle_words(values)),
        ("load", _load_words(values)),
    ]


def _clock_words(values: Mapping[str, Any]) -> str:
    """By kind; of several of a kind, from the slowest to the fastest."""
    clocks = values["clocks_hz"]
    if clocks is None:
        return UNKNOWN
    governors = {"cpu": values["cpu_governor"], "gpu": values["gpu_governor"]}
    words = []
    for kind in ("cpu", "gpu", "emc"):
        alike = [clock for name, clock in clocks.items() if name.startswith(kind)]
        governor = f" ({governors[kind]})" if governors.get(kind) else ""
        words += [f"{kind} {_clock(alike)}{governor}"] if alike else []
    return ", ".join(words)


def _clock(clocks: Sequence[Mapping[str, Any]]) -> str:
    low, high = min(clock["min"] for clock in clocks) / 1e6, max(clock["max"] for clock in clocks) / 1e6
    is_pinned = all(c["lowest_allowed"] is not None and c["lowest_allowed"] == c["highest_allowed"] for c in clocks)
    return (f"{high:.0f} MHz" if low == high else f"{low:.0f} to {high:.0f} MHz") + (" pinned" if is_pinned else "")


def _hottest_words(temperatures: Mapping[str, Any] | None) -> str:
    if temperatures is None:
        return UNKNOWN
    name, hottest = max(temperatures.items(), key=lambda item: item[1]["max"])
    return f"up to {hottest['max']:.0f} °C ({name.removeprefix('temperature ')})"


def _throttle_words(values: Mapping[str, Any]) -> str:
    shares, counts = values["throttling_share"], values["throttle_counts"]
    if shares is None and counts is None:
        return UNKNOWN
    active = [
        f"{name.removeprefix('throttling ')} {share:.0%} of the time" for name, share in (shares or {}).items() if share
    ]
    active += [f"{name} {count} times" for name, count in (counts or {}).items() if count]
    return ", ".join(active) or "none"


def _load_words(values: Mapping[str, Any]) -> str:
    if values["load"] is None:
        return UNKNOWN
    shares = ((values["busy_share"], "busy"), (values["stolen_share"], "stolen"))
    return ", ".join([f"{values['load']:.1f}", *(f"{share:.0%} {what}" for share, what in shares if share is not None)])


def is_throttled(values: Mapping[str, Any]) -> bool:
    """Whether the machine said that it slowed itself down."""
    return any((values["throttling_share"] or {}).values()) or any((values["throttle_counts"] or {}).values())
