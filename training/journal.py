"""What a run tells while it goes: a line per report in history.jsonl, curves in TensorBoard."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from onbeat.training.fit import Losses
from onbeat.training.objective import Answered
from onbeat.training.tally import Tally

HISTORY_FILE = "history.jsonl"
CURVES_FOLDER = "tensorboard"


class Journal:
    """The records of one run in its folder. step: what the run goes on from; later records of a killed run are void."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / HISTORY_FILE
        cut_history(self.path, step)
        self._curves = SummaryWriter(str(out / CURVES_FOLDER), purge_step=step + 1)
        self._rows, self._tally, self._began_s = list[Losses](), Tally(), time.monotonic()

    def step(self, step: int, losses: Losses, answers: Sequence[Answered], rate: float, samples_per_s: float) -> None:
        """The curves of one step."""
        self._rows.append(losses)
        self._tally.add(answers)
        for name, value in losses._asdict().items():
            self._curves.add_scalar("gradient_norm" if name == "norm" else f"loss/{name}", value, step)
        self._curves.add_scalar("learning_rate", rate, step)
        self._curves.add_scalar("samples_per_s", samples_per_s, step)

    def report(self, step: int, held_out: Mapping[str, float]) -> dict[str, float]:
        """A line of history, which is returned, and the curves of robots, tasks and held-out data."""
        elapsed_s = round(time.monotonic() - self._began_s, 1)
        told = {f"held_out_{name}": value for name, value in held_out.items()}
        row = {"step": step, "elapsed_s": elapsed_s, **self._means(), **told}
        append_history(self.path, row)
        for name, value in {**self._tally.take(), **told}.items():
            self._curves.add_scalar(name.replace(" ", "_"), value, step)
        self._curves.flush()
        return row

    def _means(self) -> dict[str, float]:
        """Of the losses since the last report, and start anew."""
        means = torch.tensor(self._rows).mean(0).tolist()
        self._rows = []
        return dict(zip(Losses._fields, means, strict=True))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
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
