"""What a run tells while it goes: a line per report in history.jsonl, curves in TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from onbeat.training.fit import Losses

HISTORY_FILE = "history.jsonl"
CURVES_FOLDER = "tensorboard"


class Journal:
    """The records of one run in its folder. step: what the run goes on from; later records of a killed run are void."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / HISTORY_FILE
        cut_history(self.path, step)
        self._curves = SummaryWriter(str(out / CURVES_FOLDER), purge_step=step + 1)
        self._rows: list[Losses] = []

    def step(self, step: int, losses: Losses, rate: float, samples_per_s: float) -> None:
        """The curves of one step."""
        self._rows.append(losses)
        *parts, norm = losses
        for name, value in zip(Losses._fields, parts, strict=False):
            self._curves.add_scalar(f"loss/{name}", value, step)
        self._curves.add_scalar("gradient_norm", norm, step)
        self._curves.add_scalar("learning_rate", rate, step)
        self._curves.add_scalar("samples_per_s", samples_per_s, step)

    def means(self) -> dict[str, float]:
        """Of the losses since the last report, and start anew."""
        means = torch.tensor(self._rows).mean(0).tolist()
        self._rows = []
        return dict(zip(Losses._fields, means, strict=True))

    def report(self, step: int, row: Mapping[str, float], tally: Mapping[str, float]) -> None:
        """One line, and the curves of robots, tasks and held-out data."""
        append_history(self.path, row)
        held_out = {name: value for name, value in row.items() if name.startswith("held_out_")}
        for name, value in {**tally, **held_out}.items():
            self._curves.add_scalar(name.replace(" ", "_"), value, step)
        self._curves.flush()

    def close(self) -> None:
        self._curves.close()


def append_history(path: Path, row: Mapping[str, float]) -> None:
    """One line of JSON per report."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")


def cut_history(path: Path, step: int) -> None:
    """Keep the lines up to a step: a run that was killed after a report tells it again. Whole or not at all."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line that was being written when the run was killed
        return float("inf")
