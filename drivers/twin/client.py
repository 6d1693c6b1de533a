"""Start the twin in a process of its own and talk to it: a port, cameras, and the folder where its truth is written."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onbeat
from onbeat.drivers.twin.frames import SHARED_MEMORY, SharedFrameCamera
from onbeat.embodiment.errors import OnbeatError

LOG_FILE = "twin.log"


class TwinFailed(OnbeatError):
    """The twin did not start; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class RunningTwin:
    """port: of the servo bus. frames: view -> ring name. run_dir: the truth, for the supervisor and nobody else."""

    port: str
    frames: dict[str, str]
    run_dir: Path
    pid: int

    def open_cameras(self) -> tuple[SharedFrameCamera, ...]:
        """One camera per view, in the twin's order."""
        return tuple(SharedFrameCamera(ring, view) for view, ring in self.frames.items())


@contextmanager
def start_twin(
    run_dir: Path,
    *,
    seed: int = 0,
    frame_size: int = 112,
    camera_rate_hz: float = 10.0,
    has_cameras: bool = True,
    attempt_timeout_s: float = 12.0,
    is_paced: bool = True,
    startup_timeout_s: float = 60.0,
) -> Iterator[RunningTwin]:
    """A twin for the length of a `with` block, which must be entered from a thread that lives as long: it ends with it.

    Raises TwinFailed when the simulator or its drawing libraries are missing, or nothing is ready in time.
    """
    command = [sys.executable, "-m", "onbeat.drivers.twin", "--run-dir", str(run_dir), "--seed", str(seed)]
    command += ["--frame-size", str(frame_size), "--camera-rate-hz", str(camera_rate_hz)]
    command += ["--attempt-timeout-s", str(attempt_timeout_s), *([] if has_cameras else ["--no-cameras"])]
    command += [] if is_paced else ["--unpaced"]
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOG_FILE).open("wb") as log:
        # A session of its own: the Ctrl-C of a terminal must not stop the world while the arm comes to rest in it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=_environment(), start_new_session=True
        )
    frames: dict[str, str] = {}
    try:
        told = _first_line(process, run_dir, startup_timeout_s)
        frames = told["frames"]
        yield RunningTwin(told["port"], frames, run_dir, told["pid"])
    finally:
        _end(process)
        for ring in frames.values():  # a twin that was killed leaves its memory behind
            (SHARED_MEMORY / ring).unlink(missing_ok=True)
        (SHARED_MEMORY / f"onbeat-{process.pid}-world").unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    """The child finds this very package, installed or not."""
    root = str(Path(onbeat.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _first_line(process: subprocess.Popen[bytes], run_dir: Path, timeout_s: float) -> dict:
    """What the twin says when it is ready. Raises TwinFailed."""
    assert process.stdout is not None
    is_late = threading.Timer(timeout_s, process.kill)
    is_late.start()
    line = process.stdout.readline()
    is_late.cancel()
    if not line:
        code = process.wait()
        raise TwinFailed(f"the twin ended with exit code {code} before it was ready: read {run_dir / LOG_FILE}")
    told = json.loads(line)
    if "error" in told:
        raise TwinFailed(f"the twin did not start: {told['error']}")
    return told


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(8)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
