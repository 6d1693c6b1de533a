"""What runs, as the first message of every file of a log has it."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onbeat.runtime.engine import PolicySpec
from onbeat.runtime.flight.backend import backend
from onbeat.runtime.flight.fault_bits import NAMES
from onbeat.runtime.flight.messages import FORMAT
from onbeat.runtime.flight.recorder import sizes_of
from onbeat.runtime.profile.machine import MachineSampler
from onbeat.runtime.provenance import bundle_hash, git_commit, versions
from onbeat.runtime.robots import Robot, as_json


def make_header(
    config: Mapping[str, Any],
    robot: Robot,
    spec: PolicySpec,
    *,
    mode: str,
    sampler: MachineSampler | None = None,
) -> dict[str, Any]:
    """The fields of /header. config: what the runtime was told, with "bundle" where there is one."""
    cameras, machine = list(robot.config.cameras), {} if sampler is None else sampler.about()
    sizes = sizes_of(
        spec,
        joints=len(robot.joints),
        views=len(cameras),
        threads=len(machine.get("threads", ())),
        probes=len(machine.get("probes", ())),
    )
    return {
        "format": FORMAT,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "started_ns": time.monotonic_ns(),
        "config": {**config, "robot": as_json(robot.config)},
        "joints": list(robot.joints),
        "cameras": cameras,
        "sizes": sizes,
        "faults": NAMES,
        "mode": mode,
        "policy_period_ns": robot.policy_period_ns,
        "rate_hz": robot.config.loop_rate_hz,
        "versions": versions(),
        "git_commit": git_commit(),
        "backend": backend(threads=int(config.get("threads", 1))),
        "machine": machine,
        "bundle_sha256": bundle_hash(Path(config["bundle"])) if "bundle" in config else None,
        "calibration_sha256": file_hash(Path(robot.config.calibration)),
    }


def file_hash(path: Path) -> str | None:
    """sha256 of a file; None when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
