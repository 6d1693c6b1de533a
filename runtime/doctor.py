"""`onbeat doctor`: what this machine has, what it lacks, and the command that mends each lack.

First the facts are gathered (`gather`, which touches the machine), then judged (`judge`, pure).
"""

import argparse
import ctypes.util
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from onbeat.embodiment.errors import OnbeatError

OK, OPTIONAL, FAILED = "ok", "optional", "failed"
PYTHON_FROM, PYTHON_BELOW = (3, 10), (3, 13)
CORES = 2  # one for the loop, one for inference
RENDER_TIMEOUT_S = 120
GL_PACKAGES = {"EGL": "libegl1 libgl1-mesa-dri", "OSMesa": "libosmesa6"}
RENDER_PROBE = """
from onbeat.drivers.twin.world import VIEWS, World
world = World()
world.reset(0)
frame = world.render(VIEWS[0])
print("x".join(map(str, frame.shape)), "range", frame.min(), frame.max())
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. state: "ok", "optional" (absent and not needed) or "failed". remedy: empty when ok."""

    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Package:
    """A requirement of ours. extra: "" for the robot's own. conditional: needed on some machines only."""

    name: str
    extra: str
    minimum: str
    installed: str | None
    conditional: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """A USB serial device and whether this user may read and write it."""

    path: str
    accessible: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """What a trial came to: `error` is empty when it worked, else its last line."""

    found: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything looked at. None: there is nothing of the kind on this machine. memlock_bytes: -1 is unlimited."""

    python: tuple[int, int, int]
    packages: tuple[Package, ...]
    rendering: Probe | None
    gl_libraries: dict[str, bool]
    ports: tuple[Port, ...]
    fifo: bool
    memlock_bytes: int
    cores: int
    governor: str | None
    providers: tuple[str, ...] | None
    jetson: str | None
    power_mode: str | None
    bundles: dict[str, Probe]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 when everything required is there, else 1."""
    arguments = _parser().parse_args(argv)
    checks = judge(gather(arguments.bundles or shipped_bundles()))
    print(as_json(checks) if arguments.json else as_text(checks))
    return exit_code(checks)


def exit_code(checks: Iterable[Check]) -> int:
    """1 when a required thing is missing."""
    return int(any(check.state == FAILED for check in checks))


def as_json(checks: Sequence[Check]) -> str:
    """{"ok": bool, "checks": [{name, state, found, remedy}]}."""
    return json.dumps({"ok": exit_code(checks) == 0, "checks": [asdict(check) for check in checks]}, indent=2)


def as_text(checks: Sequence[Check]) -> str:
    """One line per check, each that is not ok ending with its remedy; then the count."""
    rows = ((check.name, check.state, _with_remedy(check)) for check in checks)
    failed = sum(check.state == FAILED for check in checks)
    verdict = "everything required is there" if failed == 0 else f"{failed} required missing"
    return f"{_left_table(rows)}\n{verdict}"


def judge(facts: Facts) -> list[Check]:
    """The table, in reading order."""
    return [
        _python(facts.python),
        *map(_package, facts.packages),
        *_rendering(facts),
        _providers(facts.providers),
        *_ports(facts.ports),
        *_real_time(facts),
        *_processor(facts),
        *_jetson(facts),
        *_bundles(facts.bundles),
    ]


def _python(version: tuple[int, int, int]) -> Check:
    text = ".".join(map(str, version))
    if PYTHON_FROM <= version[:2] < PYTHON_BELOW:
        return Check("python", OK, text)
    return Check("python", FAILED, text, "install Python 3.10, 3.11 or 3.12 and run `make` again")


def _package(package: Package) -> Check:
    label = f"{package.name} [{package.extra or 'robot'}]"
    target = f"onbeat[{package.extra}]" if package.extra else "onbeat"
    remedy = f"run `pip install '{target}'`"
    if package.installed is None:
        required = not package.extra and not package.conditional
        return Check(label, FAILED if required else OPTIONAL, "not installed", remedy)
    if _numbers(package.installed) < _numbers(package.minimum):
        return Check(label, FAILED, f"{package.installed}, older than {package.minimum}", f"{remedy} --upgrade")
    return Check(label, OK, package.installed)


def _rendering(facts: Facts) -> Iterator[Check]:
    if facts.rendering is None:
        yield Check("rendering [sim]", OPTIONAL, "MuJoCo is not installed", "run `pip install 'onbeat[sim]'`")
    elif facts.rendering.error:
        yield Check("rendering [sim]", FAILED, facts.rendering.error, _gl_remedy(GL_PACKAGES))
    else:
        yield Check("rendering [sim]", OK, facts.rendering.found)
    for library, present in facts.gl_libraries.items():
        remedy = "" if present else _gl_remedy([library])
        yield Check(f"{library} [sim]", OK if present else OPTIONAL, "found" if present else "not found", remedy)


def _gl_remedy(libraries: Iterable[str]) -> str:
    return f"run `apt-get install {' '.join(GL_PACKAGES[name] for name in libraries)}`"


def _providers(providers: tuple[str, ...] | None) -> Check:
    if providers:
        return Check("onnxruntime providers", OK, ", ".join(providers))
    return Check("onnxruntime providers", FAILED, "none", "run `pip install --force-reinstall onnxruntime`")


def _ports(ports: tuple[Port, ...]) -> Iterator[Check]:
    if not ports:
        yield Check("serial port", OPTIONAL, "no USB serial device", "plug the arm in (the twin needs none)")
    for port in ports:
        if port.accessible:
            yield Check("serial port", OK, port.path)
        else:
            remedy = "run `sudo usermod -aG dialout $USER` and log in again"
            yield Check("serial port", FAILED, f"{port.path}: permission denied", remedy)


def _real_time(facts: Facts) -> Iterator[Check]:
    remedy = "add `@realtime - {} {}` to /etc/security/limits.d/onbeat.conf, join the group, and log in again"
    if facts.fifo:
        yield Check("real-time scheduling", OK, "SCHED_FIFO permitted")
    else:
        yield Check("real-time scheduling", OPTIONAL, "SCHED_FIFO not permitted", remedy.format("rtprio", 80))
    if facts.memlock_bytes == -1:
        yield Check("locked memory", OK, "unlimited")
    else:
        found = f"{facts.memlock_bytes // 1024} KiB"
        yield Check("locked memory", OPTIONAL, found, remedy.format("memlock", "unlimited"))


def _processor(facts: Facts) -> Iterator[Check]:
    if facts.cores >= CORES:
        yield Check("cores", OK, str(facts.cores))
    else:
        yield Check("cores", OPTIONAL, str(facts.cores), f"give it {CORES}: the loop and inference want one each")
    if facts.governor in (None, "performance"):
        yield Check("cpu governor", OK, facts.governor or "not adjustable here")
    else:
        remedy = "run `echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor`"
        yield Check("cpu governor", OPTIONAL, str(facts.governor), remedy)


def _jetson(facts: Facts) -> Iterator[Check]:
    if facts.jetson is None:
        return
    yield Check("jetson release", OK, facts.jetson)
    if facts.power_mode is None:
        yield Check("jetson power mode", OPTIONAL, "unknown", "run `sudo nvpmodel -q`")
    else:
        yield Check("jetson power mode", OK, facts.power_mode)


def _bundles(bundles: dict[str, Probe]) -> Iterator[Check]:
    if not bundles:
        yield Check("bundle", OPTIONAL, "none found", "run `onbeat export`, or name a bundle folder")
    for path, probe in bundles.items():
        if probe.error:
            found, _, remedy = probe.error.rpartition(": ")  # an error of ours ends with its remedy
            yield Check("bundle", FAILED, f"{path}: {found or remedy}", remedy if found else _export_remedy(path))
        else:
            yield Check("bundle", OK, f"{path}: {probe.found}")


def _export_remedy(path: str) -> str:
    return f"run `onbeat export CHECKPOINT {path} --replace`"


def shipped_bundles() -> list[Path]:
    """The bundles of this checkout, seen from its root; none elsewhere."""
    return sorted(path.parent for path in Path("bundles").glob("*/manifest.json"))


def gather(bundles: Sequence[Path] = ()) -> Facts:
    """Look at the machine. Takes seconds: rendering is tried in a process of its own, since a bad driver may abort."""
    packages = required_packages(_own_requirements())
    simulator = any(p.name == "mujoco" and p.installed for p in packages)
    return Facts(
        python=sys.version_info[:3],
        packages=packages,
        rendering=probe_rendering() if simulator else None,
        gl_libraries={name: ctypes.util.find_library(name) is not None for name in GL_PACKAGES},
        ports=tuple(Port(str(p), os.access(p, os.R_OK | os.W_OK)) for p in _usb_serial_devices()),
        fifo=_fifo_permitted(),
        memlock_bytes=_memlock_bytes(),
        cores=len(os.sched_getaffinity(0)),
        governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        providers=_onnxruntime_providers(),
        jetson=_first_line(Path("/etc/nv_tegra_release")),
        power_mode=_power_mode(),
        bundles={str(path): probe_bundle(path) for path in bundles},
    )


def required_packages(requirements: Iterable[str]) -> tuple[Package, ...]:
    """Our requirements that this Python is meant by, each with the version that is installed."""
    return tuple(_parse_requirement(line) for line in requirements if not _is_for_older_python(line))


def _own_requirements() -> list[str]:
    try:
        return importlib.metadata.requires("onbeat") or []
    except importlib.metadata.PackageNotFoundError:
        return ["onbeat"]


def _is_for_older_python(requirement: str) -> bool:
    bound = re.search(r"python_version\s*<\s*[\"']([\d.]+)", requirement)
    return bound is not None and sys.version_info[:2] >= _numbers(bound.group(1))


def _parse_requirement(line: str) -> Package:
    requirement, _, marker = line.partition(";")
    parts = re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", requirement)
    assert parts is not None, line
    name, minimum = parts.groups()
    extra = re.search(r"extra == [\"']([\w-]+)", marker)
    conditional = "platform_machine" in marker
    return Package(name, extra.group(1) if extra else "", minimum or "0", _installed_version(name), conditional)


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading release numbers: "2.13.0+cpu" is (2, 13, 0)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def probe_rendering(code: str = RENDER_PROBE, timeout_s: float = RENDER_TIMEOUT_S) -> Probe:
    """Render one frame of the twin in a fresh process."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Probe("", f"no frame within {timeout_s:.0f} s")
    if done.returncode == 0:
        return Probe(done.stdout.strip())
    return Probe("", (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])


def probe_bundle(path: Path) -> Probe:
    """Load a bundle, hashes checked."""
    from onbeat.runtime.policy import load_policy

    try:
        load_policy(path)
    except (OnbeatError, OSError) as error:
        return Probe("", str(error))
    return Probe("loads")


def _usb_serial_devices() -> list[Path]:
    return sorted(p for pattern in ("ttyACM*", "ttyUSB*") for p in Path("/dev").glob(pattern))


def _fifo_permitted() -> bool:
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, policy, parameters)
    return True


def _memlock_bytes() -> int:
    return -1 if os.geteuid() == 0 else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def _onnxruntime_providers() -> tuple[str, ...] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return tuple(onnxruntime.get_available_providers())


def _power_mode() -> str | None:
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return " ".join(done.stdout.split()) or None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip().splitlines()[0]
    except (OSError, IndexError):
        return None


def _with_remedy(check: Check) -> str:
    return f"{check.found}: {check.remedy}" if check.remedy else check.found


def _left_table(rows: Iterable[tuple[str, str, str]]) -> str:
    table = list(rows)
    name, state = (max(len(row[c]) for row in table) for c in (0, 1))
    return "\n".join(f"{row[0]:<{name}}  {row[1]:<{state}}  {row[2]}" for row in table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="onbeat doctor", description="Check this machine, and say how to mend it.")
    parser.add_argument(
        "bundles", nargs="*", type=Path, metavar="BUNDLE", help="bundle folders to load (default: all in ./bundles)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    return parser
