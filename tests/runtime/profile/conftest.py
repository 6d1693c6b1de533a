"""A run that looks like a real one, made of arithmetic: 100 Hz loop, 10 Hz inference, a machine that is sampled."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from onbeat.kernels.limit import HELD
from onbeat.runtime.run_records import ChunkRecord, MachineRecords, RunRecords, Ticks

MS, S = 1_000_000, 1_000_000_000
ZERO_NS = 50 * S
PERIOD_NS, ROWS = 100 * MS, 8
STAGES_MS = {"camera_age": 8.0, "observe": 2.0, "prefix": 15.0, "flow": 22.0, "publish": 1.0}
MachineOf = Callable[..., MachineRecords]


def correlated(rng: np.random.Generator, count: int, rho: float) -> NDArray[np.float64]:
    """Standard normal, each sample rho of the one before."""
    noise, out = rng.standard_normal(count), np.empty(count)
    out[0] = noise[0]
    for k in range(1, count):
        out[k] = rho * out[k - 1] + np.sqrt(1 - rho * rho) * noise[k]
    return out


def make_machine(seconds: float = 30.0, *, gpu_mhz: float = 1020.0, throttled: bool = False) -> MachineRecords:
    """Two samples a second of three threads and five probes."""
    count = int(seconds * 2) + 1
    t_ns = ZERO_NS + np.arange(count) * S // 2
    kinds = [("t_ns", "i8"), ("resident_bytes", "i8"), ("busy_ns", "i8"), ("stolen_ns", "i8"), ("load", "f8")]
    of_threads = [
        (n, "i8", (3,)) for n in ("cpu_ns", "wait_ns", "minor_faults", "major_faults", "sleeps", "preemptions")
    ]
    samples = np.zeros(count, np.dtype([*kinds, ("power_mode", "i8"), *of_threads, ("probes", "f8", (5,))]))
    samples["t_ns"], samples["load"], samples["power_mode"] = t_ns, 1.5, 2
    samples["resident_bytes"] = 200_000_000 + np.arange(count) * 1000
    samples["busy_ns"], samples["stolen_ns"] = np.arange(count) * S // 2, np.arange(count) * S // 100
    samples["cpu_ns"] = np.arange(count)[:, None] * np.array([S // 100, S // 4, S // 50])
    samples["minor_faults"] = np.arange(count)[:, None] * np.array([0, 3, 1])
    samples["probes"] = [gpu_mhz * 1e6, 55.0, np.nan, 0.0, 0.0]
    samples["probes"][count // 2 :, 1] = 61.0
    if throttled:
        samples["probes"][-3:, 3], samples["probes"][-1, 4] = 1.0, 12.0
    probes = ["gpu clock 17000000.gpu", "temperature tj-thermal", "temperature cv0-thermal"]
    about = {
        "threads": ["loop", "inference", "other"],
        "probes": [*probes, "throttling gpu-throttle-alert", "over-current oc3"],
        "units": ["Hz", "°C", "°C", "state", "count"],
        "bounds": {"gpu clock 17000000.gpu": [1.02e9, 1.02e9]},
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "release": None,
        "kernel": "5.15.148-tegra",
        "cores": 6,
        "memory_bytes": 8_000_000_000,
        "power_mode": "MAXN_SUPER",
        "cpu_governor": "schedutil",
        "gpu_governor": None,
    }
    return MachineRecords(about, samples)


def make_run(
    seed: int = 0,
    seconds: float = 30.0,
    *,
    slower: dict[str, float] | None = None,
    machine: MachineRecords | None = None,
) -> RunRecords:
    """slower: key of a stage -> factor on how long it takes."""
    rng, factor = np.random.default_rng(seed), {**dict.fromkeys(STAGES_MS, 1.0), **(slower or {})}
    ticks = int(seconds * 100)
    due = ZERO_NS + np.arange(ticks) * 10 * MS
    late = np.exp(0.3 * correlated(rng, ticks, 0.6)) * 0.04 * factor.get("lateness", 1.0)
    late[rng.random(ticks) < 0.003] += 2.0
    start = due + (late * MS).astype(np.int64)
    chunks = _chunks(rng, int(seconds * 10), factor)
    chunk_id, row = _in_force(chunks, start)
    goal = np.sin(np.arange(ticks) / 50)[:, None] * [1.0, 0.5]
    faults = np.zeros(ticks, np.int64)
    faults[ticks // 2 : ticks // 2 + 40] = 1 << 3
    columns = Ticks(
        due_ns=np.where(np.arange(ticks) > ticks // 3, due + 10 * MS, due),  # one deadline let go
        start_ns=np.where(np.arange(ticks) > ticks // 3, start + 10 * MS, start),
        compute_ns=(np.exp(0.2 * correlated(rng, ticks, 0.4)) * 8000).astype(np.int64),
        exchange_ns=(np.exp(0.1 * correlated(rng, ticks, 0.8)) * 1.4 * MS * factor.get("exchange", 1.0)).astype(
            np.int64
        ),
        goal_rad=goal,
        position_rad=goal + 0.01,
        chunk_id=chunk_id,
        row=row,
        flags=np.where(chunk_id < 0, HELD, 0),
        faults=faults,
    )
    header = {
        "started": "2026-11-25T12:00:00+0000",
        "robot": "so101-twin",
        "config": {"seconds": seconds, "bundle": "b", "robot": {"name": "so101-twin", "port": f"/dev/pts/{seed}"}},
        "versions": {"python": "3.11.2", "onbeat": "0.1.0"},
        "git_commit": None,
        "bundle_sha256": "ab" * 32,
        "calibration_sha256": None,
        "real_time": {"SCHED_FIFO": "got"},
        "error": None,
        "log_problems": [],
        "instruction": "lift <the> cube",
        "mode": "async",
        "rate_hz_wanted": 100.0,
    }
    return RunRecords(
        header=header,
        joints=("shoulder_pan", "gripper"),
        policy_period_ns=PERIOD_NS,
        ticks=columns,
        missed_ticks=1,
        chunks=chunks,
        faults={"no_reply": 2},
        truth=None,
        pictures={},
        warm_up_ns=(812 * MS, 44 * MS),
        machine=machine,
    )


def _chunks(rng: np.random.Generator, count: int, factor: dict[str, float]) -> tuple[ChunkRecord, ...]:
    common = np.exp(0.08 * correlated(rng, count, 0.7))
    own = {name: common * np.exp(0.03 * rng.standard_normal(count)) for name in STAGES_MS}
    return tuple(
        _chunk(k, {n: int(STAGES_MS[n] * factor[n] * own[n][k] * MS) for n in STAGES_MS}) for k in range(count)
    )


def _chunk(k: int, stages_ns: dict[str, int]) -> ChunkRecord:
    observed = ZERO_NS + k * PERIOD_NS
    started = observed + stages_ns["camera_age"]
    published = started + sum(stages_ns.values()) - stages_ns["camera_age"]
    first_row = 1 + -(-(published - observed) // PERIOD_NS)
    return ChunkRecord(k, observed, observed, started, published, ROWS, 2, 1, int(first_row), stages_ns)


def _in_force(
    chunks: tuple[ChunkRecord, ...], start_ns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    seams = np.array([chunk.t0_ns + (chunk.first_row - 1) * PERIOD_NS for chunk in chunks])
    chunk_id = np.searchsorted(seams, start_ns, side="right") - 1
    row = np.where(chunk_id < 0, -1, (start_ns - ZERO_NS - chunk_id * PERIOD_NS) // PERIOD_NS)
    return chunk_id.astype(np.int64), row.astype(np.int64)


@pytest.fixture
def run_of() -> Callable[..., RunRecords]:
    return make_run


@pytest.fixture
def machine_of() -> MachineOf:
    return make_machine
