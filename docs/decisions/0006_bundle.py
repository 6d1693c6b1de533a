"""The figures of 0006: what exporting, sealing and opening the recorded checkpoints' bundles costs.

python docs/decisions/0006_bundle.py
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from onbeat.export.export import main as export
from onbeat.runtime.bundle import load_bundle

REPEATS = 5


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(the fastest, the slowest) of REPEATS."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times), max(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for k in range(3):
            begun = time.perf_counter()
            export(["--cases", "tests/golden", str(Path(scratch) / str(k))])
            print(f"export of all recorded checkpoints, proof included: {time.perf_counter() - begun:.2f} s")
        for folder in sorted(path.parent for path in (Path(scratch) / "0").glob("*/manifest.json")):
            print(row(folder))


def row(folder: Path) -> str:
    """Of one bundle."""
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    load = seconds(lambda: load_bundle(folder))
    opened = seconds(lambda: load_bundle(folder).open_engine(threads=1))
    return (
        f"{folder.name}: {size_mb:.2f} MB; load with all hashes {load[0] * 1e3:.1f} to {load[1] * 1e3:.1f} ms; "
        f"that and both sessions {opened[0]:.2f} to {opened[1]:.2f} s"
    )


if __name__ == "__main__":
    main()
