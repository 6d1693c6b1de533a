"""What the board says of itself: clocks, power mode, temperatures, throttling, power, fan, from sysfs and /proc.

`SENSORS` is the one table of where each figure lies; what a machine lacks is simply not there. Paths are relative to a
root folder, so that recorded trees are read like the machine. Tried on x86-64 and on trees written after what is
documented of Jetsons (docs/profile.md has the sources); no Jetson has been tried.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from onbeat.runtime.profile.process import read_text

MOST_BELOW_ZERO_C: Final = -100.0  # a sensor of a part that is off says -256
POWER_STATUS: Final = "var/lib/nvpmodel/status"  # "pmode:0002"
POWER_MODES: Final = "etc/nvpmodel.conf"  # "< POWER_MODEL ID=2 NAME=MAXN_SUPER >"
RELEASE: Final = "etc/nv_tegra_release"


@dataclass(frozen=True, slots=True)
class Sensor:
    """A kind of figure, and where it lies.

    values: globs of files, of which the first that matches anything counts. label: the file beside a value that names
    it, relative to its folder; "" for the folder's name. scale: of the file's number to `unit`. keep: which names
    count. low, high: files beside it that bound it, where there are any.
    """

    kind: str
    unit: str
    values: tuple[str, ...]
    scale: float = 1.0
    label: str = ""
    keep: str = ""
    low: str = ""
    high: str = ""


SENSORS: Final = (
    Sensor(
        "cpu clock",
        "Hz",
        (
            "sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq",
            "sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq",
        ),
        scale=1e3,
        low="scaling_min_freq",
        high="scaling_max_freq",
    ),
    Sensor(
        "gpu clock",
        "Hz",
        (
            "sys/class/devfreq/gpu-gpc-*/cur_freq",
            "sys/class/devfreq/*.gpu/cur_freq",
            "sys/class/devfreq/*.ga10b/cur_freq",
            "sys/devices/platform/*.gpu/devfreq_dev/cur_freq",
        ),
        low="min_freq",
        high="max_freq",
    ),
    Sensor(
        "gpu load", "%", ("sys/class/devfreq/*.gpu/device/load", "sys/class/devfreq/*.ga10b/device/load"), scale=0.1
    ),
    Sensor("emc clock", "Hz", ("sys/class/devfreq/bwmgr/cur_freq",), low="min_freq", high="max_freq"),
    Sensor("emc clock", "Hz", ("sys/kernel/debug/bpmp/debug/clk/emc/rate",), low="min_rate", high="max_rate"),
    Sensor("temperature", "°C", ("sys/class/thermal/thermal_zone*/temp",), scale=1e-3, label="type"),
    Sensor("throttling", "state", ("sys/class/thermal/cooling_device*/cur_state",), label="type", keep="-alert$"),
    Sensor("over-current", "count", ("sys/class/hwmon/hwmon*/oc[0-9]_event_cnt",)),
    Sensor("thermal throttle", "count", ("sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count",)),
    Sensor("fan", "rpm", ("sys/class/hwmon/hwmon*/rpm", "sys/class/hwmon/hwmon*/fan1_input")),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """One figure that this machine has, where, and how it is read. times: a file multiplied with it (a current)."""

    kind: str
    name: str
    unit: str
    path: Path
    scale: float
    low: float | None = None
    high: float | None = None
    times: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"

    def read(self) -> float | None:
        """Now; None when it cannot be read, or belongs to a part that is switched off."""
        value = read_number(self.path)
        factor = 1.0 if self.times is None else read_number(self.times)
        if value is None or factor is None:
            return None
        scaled = value * factor * self.scale
        return None if self.unit == "°C" and scaled < MOST_BELOW_ZERO_C else scaled


def find_probes(root: Path) -> tuple[Probe, ...]:
    """All that the machine under `root` has, in the order of SENSORS, power rails last."""
    found: dict[str, Probe] = {}
    for sensor in SENSORS:
        if not any(probe.kind == sensor.kind for probe in found.values()):
            _add(found, _probes_of(sensor, root))
    _add(found, _rails(root))
    return tuple(found.values())


def _add(found: dict[str, Probe], probes: Iterable[Probe]) -> None:
    """Each under a name of its own: a PC may have two sensors that call themselves the same."""
    for probe in probes:
        alike = sum(name == probe.title or name.startswith(f"{probe.title} #") for name in found)
        own = replace(probe, name=f"{probe.name} #{alike + 1}") if alike else probe
        found[own.title] = own


def _probes_of(sensor: Sensor, root: Path) -> Iterator[Probe]:
    matches = next((paths for glob in sensor.values if (paths := _sorted(root, glob))), [])
    for path in matches:
        name = _name(sensor, path)
        if re.search(sensor.keep, name):
            low, high = (_bound(path.parent, file, sensor.scale) for file in (sensor.low, sensor.high))
            yield Probe(sensor.kind, name, sensor.unit, path, sensor.scale, low, high)


def _name(sensor: Sensor, path: Path) -> str:
    if sensor.label:
        return read_text(path.parent / sensor.label) or path.parent.name
    if sensor.unit == "count":
        return path.name.removesuffix("_event_cnt").removesuffix("_count")
    return path.parent.parent.name if path.parent.name in ("cpufreq", "devfreq_dev", "device") else path.parent.name


def _bound(folder: Path, file: str, scale: float) -> float | None:
    value = read_number(folder / file) if file else None
    return None if value is None else value * scale


def _rails(root: Path) -> Iterator[Probe]:
    """Power rails behind TI's monitors: volts times amperes of an INA3221, or the power an INA238 has computed."""
    for folder in _sorted(root, "sys/class/hwmon/hwmon*"):
        if read_text(folder / "name") not in ("ina3221", "ina238"):
            continue
        for voltage in _sorted(folder, "in[0-9]_input"):
            current, label = (voltage.with_name(voltage.name[:3].replace("in", part) + end) for part, end in _PARTS)
            if current.exists() and label.exists():
                yield Probe("power", read_text(label) or voltage.name, "W", voltage, 1e-6, times=current)
        for power in _sorted(folder, "power[0-9]_input"):
            yield Probe("power", read_text(folder / "in1_label") or folder.name, "W", power, 1e-6)


_PARTS: Final = (("curr", "_input"), ("in", "_label"))


def _sorted(root: Path, glob: str) -> list[Path]:
    """Matches by the numbers in their names, so that zone 10 comes behind zone 9; none where the folder is closed."""
    try:
        return sorted(root.glob(glob), key=lambda path: _numbers(path.relative_to(root)))
    except OSError:
        return []


def _numbers(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", str(path))]


def read_number(path: Path) -> float | None:
    """The number in a small file; None when there is none."""
    text = read_text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def power_mode(root: Path) -> int | None:
    """The id of the power mode in force, as nvpmodel wrote it down."""
    match = re.search(r"pmode:\s*(\d+)", read_text(root / POWER_STATUS) or "")
    return int(match[1]) if match else None


def power_modes(root: Path) -> dict[int, str]:
    """Id -> name of every power mode that the board has."""
    found = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", read_text(root / POWER_MODES) or "", re.M)
    return {int(number): name for number, name in found}


def describe(root: Path) -> dict[str, str | int | None]:
    """What does not change while it runs: name -> what the machine says, None when it says nothing."""
    mode = power_mode(root)
    return {
        "model": read_text(root / "proc/device-tree/model") or _field(root / "proc/cpuinfo", "model name"),
        "release": (read_text(root / RELEASE) or "").split("\n")[0] or None,
        "kernel": read_text(root / "proc/sys/kernel/osrelease"),
        "cores": len(re.findall(r"^cpu\d", read_text(root / "proc/stat") or "", re.M)) or None,
        "memory_bytes": _memory_bytes(root),
        "power_mode": None if mode is None else power_modes(root).get(mode, str(mode)),
        "cpu_governor": read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpu_governor": _governor(root),
    }


def _field(path: Path, name: str) -> str | None:
    match = re.search(rf"^{name}\s*:\s*(.+)$", read_text(path) or "", re.M)
    return match[1].strip() if match else None


def _memory_bytes(root: Path) -> int | None:
    total = _field(root / "proc/meminfo", "MemTotal")
    return None if total is None else int(total.split()[0]) * 1024


def _governor(root: Path) -> str | None:
    gpu = next((probe for probe in find_probes(root) if probe.kind == "gpu clock"), None)
    return None if gpu is None else read_text(gpu.path.parent / "governor")


def as_bounds(probes: tuple[Probe, ...]) -> Mapping[str, tuple[float | None, float | None]]:
    """Full name -> (low, high) of the probes that have bounds; equal ones mean that a clock is pinned."""
    return {p.title: (p.low, p.high) for p in probes if p.low is not None or p.high is not None}
