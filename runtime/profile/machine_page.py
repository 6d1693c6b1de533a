"""The sections of profile.html about what surrounds the loop: the machine, the faults, and what all was taken under."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime import chart, page
from onbeat.runtime.faults import Fault
from onbeat.runtime.profile.conditions import conditions_words, is_throttled
from onbeat.runtime.profile.figures import fault_stretches
from onbeat.runtime.run_records import RunRecords

Profile = Mapping[str, Any]
PENS: Final = ("a", "b", "c", "d", "good", "pale")


def under(profile: Profile) -> str:
    """What every figure was taken under, in one line."""
    css = "under hot" if is_throttled(profile["conditions"]) else "under"
    words = (f"{name}: <b>{escape(value)}</b>" for name, value in conditions_words(profile["conditions"]))
    return f'<p class="{css}">{" · ".join(words)}</p>'


def machine_section(profile: Profile, run: RunRecords) -> str:
    """Processor time, memory, page faults and the board's sensors over the run."""
    heading = "The machine meanwhile"
    machine = run.machine
    if machine is None or len(machine.samples) < 2:
        return page.section(
            heading, "Not recorded in this log: processor time, memory, clocks and temperatures are not known here."
        )
    times = page.seconds(run, machine.samples["t_ns"].astype(np.float64))
    names = machine.about["threads"]
    spans = np.diff(machine.samples["t_ns"])
    cpu, wait = (100 * np.diff(machine.samples[name], axis=0) / spans[:, None] for name in ("cpu_ns", "wait_ns"))
    faults = np.diff(machine.samples["minor_faults"] + machine.samples["major_faults"], axis=0) / (spans[:, None] / 1e9)
    resident = machine.samples["resident_bytes"][:, None] / 1e6
    drawings = [
        _lines("processor time", "% of one processor", times[1:], cpu, names),
        _lines("waiting for a processor", "% of the time", times[1:], wait, names),
        _lines("memory of the process", "MB resident", times, resident, ["resident"]),
        _lines("page faults", "per second", times[1:], faults, names),
        *_probe_lines(machine.about, machine.probes, times),
    ]
    words = "Sampled twice a second beside the loop. By thread, as far as threads have names; the rest is “other”."
    return page.section(heading, words, f'<div class="grid2">{"".join(drawings)}</div>', under(profile))


def _probe_lines(about: Mapping[str, Any], probes: NDArray[np.float64], times: NDArray[np.float64]) -> list[str]:
    """Clocks, temperatures and power, each kind in one drawing, as far as the machine has them."""
    drawings = []
    for caption, kind, unit, scale in PROBE_CHARTS:
        columns = [k for k, name in enumerate(about["probes"]) if kind in name and np.isfinite(probes[:, k]).any()]
        if columns:
            names = [about["probes"][k].replace(kind, "").strip() for k in columns]
            drawings.append(_lines(caption, unit, times, probes[:, columns] * scale, names))
    return drawings


PROBE_CHARTS: Final = (
    ("clocks", " clock ", "MHz", 1e-6),
    ("load of the GPU", "gpu load ", "%", 1.0),
    ("temperatures", "temperature ", "°C", 1.0),
    ("throttling", "throttling ", "state", 1.0),
    ("power", "power ", "W", 1.0),
)


def _lines(caption: str, unit: str, times: NDArray[np.float64], values: NDArray[Any], names: Sequence[str]) -> str:
    """A drawing of columns (N, K) over time, K names."""
    most = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    axes = chart.Axes(340, 170, (float(times[0]), float(times[-1])), (0.0, most * 1.1 or 1.0))
    pens = [PENS[k % len(PENS)] for k in range(len(names))]
    curves = (_curve(axes, times, values[:, k], pen) for k, pen in enumerate(pens))
    drawing = chart.svg(axes, chart.grid(axes, x_label="time, s", y_label=unit, x_ticks=5), *curves, title=caption)
    key = chart.legend([(f"ink {pen}", name) for name, pen in zip(names, pens, strict=True)]) if len(names) > 1 else ""
    return page.captioned(caption, unit, drawing + key)


def _curve(axes: chart.Axes, times: NDArray[np.float64], values: NDArray[Any], pen: str) -> str:
    return chart.line(axes, *page.thinned(times, values.astype(np.float64)), f"pen {pen}")


def faults_section(profile: Profile, run: RunRecords) -> str:
    """Which faults of the table were there when."""
    seen = [fault for fault in Fault if fault_stretches(run, fault)]
    if not seen:
        return page.section("Faults", "None of the fault table was seen in this run.")
    axes = chart.Axes(1060, 44 + 30 * len(seen), (0.0, max(profile["duration_s"], 1e-3)), (float(len(seen)), 0.0))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="", x_ticks=10, y_ticks=0),
        *(_fault_lane(axes, lane, fault, run) for lane, fault in enumerate(seen)),
        title="which faults were there when",
    )
    words = "Each bar is a stretch in which the fault was there; what follows from it stands in docs/faults.md."
    return page.section("Faults", words, page.wide(drawing))


def _fault_lane(axes: chart.Axes, lane: int, fault: Fault, run: RunRecords) -> str:
    start_ns, words = run.ticks.start_ns, fault.name.lower().replace("_", " ")
    stretches = fault_stretches(run, fault)
    spans = ((page.seconds(run, int(start_ns[a])), page.seconds(run, int(start_ns[b])) + 1e-3) for a, b in stretches)
    blocks = (chart.block(axes, span, (lane + 0.95, lane + 0.5), "ink bad", words) for span in spans)
    return "".join(blocks) + chart.note(axes, axes.x_range[0], lane + 0.4, f"{words}, {len(stretches)} ×")
