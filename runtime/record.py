"""What a run leaves behind: every tick and every chunk, kept in memory allocated at the start and written at the end.

    ticks.npz    one entry per tick
    chunks.npz   one entry per inference, with its targets
    run.json     the header (config, versions, hashes) first, then how the run ended
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.tick import RECORD, TickState

TICKS_FILE, CHUNKS_FILE, RUN_FILE = "ticks.npz", "chunks.npz", "run.json"

# T ticks, N chunks, H rows of a chunk, J joints.

STAGES = ("camera_age", "observe", "prefix", "flow", "publish")
CHUNK = np.dtype(
    [
        ("chunk_id", np.int64),  # as in the timeline, -1 when it came too late
        ("t0_ns", np.int64),  # capture time of the observation, row 0 is due then
        ("started_ns", np.int64),
        ("published_ns", np.int64),
        ("rows", np.int64),
        ("delay", np.int64),  # rows locked to what was committed
        ("first_row", np.int64),  # the first row of its own that ran, -1 when none
        *((f"{stage}_ns", np.int64) for stage in STAGES),
    ]
)


class TickLog:
    """Room for `capacity` ticks; what comes after that is counted in `dropped` and not kept."""

    def __init__(self, capacity: int, joints: int) -> None:
        self.rows = np.zeros(capacity, RECORD)
        self.due_ns = np.zeros(capacity, np.int64)
        self.start_ns = np.zeros(capacity, np.int64)
        self.exchange_ns = np.zeros(capacity, np.int64)
        self.goal_rad = np.zeros((capacity, joints))
        self.position_rad = np.zeros((capacity, joints))
        self.count = 0
        self.dropped = 0

    def append(self, state: TickState, *, due_ns: int, start_ns: int, exchange_ns: int) -> None:
        """Keep the tick that `state` has just made. exchange_ns: how long the bus took."""
        k = self.count
        if k == len(self.rows):
            self.dropped += 1
            return
        self.rows[k] = state.record[0]
        self.due_ns[k], self.start_ns[k], self.exchange_ns[k] = due_ns, start_ns, exchange_ns
        self.goal_rad[k], self.position_rad[k] = state.command_q, state.measured_q
        self.count = k + 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The kept ticks, (T,) or (T, J) each; the fields of tick.RECORD under their own names."""
        kept = slice(self.count)
        names = ("due_ns", "start_ns", "exchange_ns", "goal_rad", "position_rad")
        own = {name: getattr(self, name)[kept] for name in names}
        return {**own, **{name: self.rows[name][kept] for name in RECORD.names or ()}}


class ChunkLog:
    """Room for `capacity` chunks of up to `rows` rows."""

    def __init__(self, capacity: int, rows: int, joints: int) -> None:
        self.entries = np.zeros(capacity, CHUNK)
        self.targets = np.full((capacity, rows, joints), np.nan)
        self.count = 0
        self.dropped = 0

    def append(self, targets: NDArray[np.float64], entry: Mapping[str, int]) -> None:
        """Keep a chunk. targets: (R, J) rad as the policy gave them. entry: the fields of CHUNK but `rows`."""
        if self.count == len(self.entries):
            self.dropped += 1
            return
        values = {**entry, "rows": len(targets)}
        self.entries[self.count] = tuple(values[name] for name in CHUNK.names or ())
        self.targets[self.count, : len(targets)] = targets
        self.count += 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The kept chunks, (N,) each, and targets (N, H, J)."""
        kept = slice(self.count)
        return {"targets": self.targets[kept], **{name: self.entries[name][kept] for name in CHUNK.names or ()}}


def save(folder: Path, *, ticks: TickLog, chunks: ChunkLog, run: Mapping[str, Any]) -> None:
    """Write the three files. run: header and outcome, as JSON takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / TICKS_FILE, allow_pickle=False, **ticks.arrays())
    np.savez(folder / CHUNKS_FILE, allow_pickle=False, **chunks.arrays())
    (folder / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], dict[str, Any]]:
    """The three files of `save`: ticks, chunks, run."""
    ticks, chunks = (dict(np.load(folder / name)) for name in (TICKS_FILE, CHUNKS_FILE))
    return ticks, chunks, json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
