"""The whole trainer on a mixture: an arm, a hand, questions; experts, gate, delays, adapters; killed, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onbeat.cli import main as onbeat
from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.schema import load_embodiment
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.data.images import encode_png
from onbeat.training.data.layout import Feature
from onbeat.training.data.writer import DatasetWriter
from onbeat.training.journal import CURVES_FOLDER, HISTORY_FILE

SIDE, LENGTH = 28, 16
RECIPE = """
dataset = "mixed"
seed = 3
[data]
simulation_cap = 1.0
kinds = {{ simulation = 2, human = 2, vision_language = 1 }}
[data.sources.arm]
path = "{folder}/arm"
kind = "simulation"
embodiment = "so101"
holds_at_end = true
in_memory = true
[data.sources.hands]
path = "{folder}/hands"
kind = "human"
embodiment = "{folder}/hand.toml"
in_memory = true
[data.sources.questions]
path = "{folder}/questions.jsonl"
kind = "vision_language"
[network]
image_size = 28
vision_width = 16
vision_ffn = 32
vision_layers = 1
vision_heads = 2
und_width = 32
und_ffn = 32
gen_width = 32
gen_ffn = 48
layers = 3
heads = 2
kv_heads = 1
head_dim = 8
chunk = 8
flow_steps = 2
[network.experts]
foundation_layers = 1
count = 3
top_k = 2
[network.gate]
directions = 8
[network.adapters]
[delays.so101]
period_ms = 100
latencies = [[90, 1], [160, 3]]
[delays.hand]
period_ms = 100
probabilities = [1.0]
[fitting]
steps = {steps}
batch = 20
draws = 2
peak_rate = 5e-3
warm_up_steps = 5
ema_decay = 0.9
report_steps = {report_steps}
threads = 1
"""


HAND = """
title = "A right hand of which only the wrist is seen"
policy_period_ms = 100
views = ["ego"]
[[state]]
name = "wrist"
slot = "right_eef_position"
normalisation = "q99"
unit = "m"
[[action]]
name = "wrist"
slot = "right_eef_position"
normalisation = "q99"
unit = "m"
kind = "absolute"
"""


def record(folder: Path, robot: Embodiment, task: str) -> None:
    """Four episodes: a dot stands somewhere, and all numbers go from 0 to where it is."""
    widths = [sum(key.size for key in keys) for keys in (robot.state, robot.action)]
    numbers = {n: Feature("float32", (w,)) for n, w in zip(("observation.state", "action"), widths, strict=True)}
    camera = Feature("image", (SIDE, SIDE, 3), ["height", "width", "channels"])
    cameras = {f"observation.images.{view}": camera for view in robot.views}
    with DatasetWriter(folder, fps=10, features={**numbers, **cameras}) as writer:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            row, column = rng.integers(0, SIDE - 8, 2)
            frames = np.full((LENGTH, SIDE, SIDE, 3), 90, np.uint8)
            frames[:, row : row + 8, column : column + 8] = (220, 30, 20)
            way = np.linspace(0, row / SIDE, LENGTH, dtype=np.float32)[:, None]
            columns = {name: np.tile(way, (1, f.shape[0])) for name, f in numbers.items()}
            writer.add_episode({**columns, **dict.fromkeys(cameras, frames)}, task)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A folder with two datasets and a file of questions."""
    folder = tmp_path_factory.mktemp("mixture")
    record(folder / "arm", load_embodiment("so101"), "touch the dot")
    (folder / "hand.toml").write_text(HAND)
    record(folder / "hands", load_embodiment(folder / "hand.toml"), "wave")
    (folder / "grey.png").write_bytes(encode_png(np.full((SIDE, SIDE, 3), 90, np.uint8)))
    questions = [
        {"images": ["grey.png"], "question": "what colour is it?", "answer": "grey"},
        {"images": [], "question": "what is two and two?", "answer": "four"},
        {"images": ["grey.png"], "question": "is it grey?", "answer": "yes"},
        {"images": [], "question": "is two four?", "answer": "no"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
    return folder


def write_recipe(folder: Path, mixture: Path, steps: int = 60, report_steps: int = 20) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=mixture, steps=steps, report_steps=report_steps))
    return path


@pytest.mark.slow
def test_a_mixture_is_learnt_told_exported_and_verified(mixture: Path, tmp_path: Path, capsys) -> None:
    arguments = ["train", str(write_recipe(tmp_path, mixture)), "--out", str(tmp_path / "out"), "--json"]
    check_rehearsal(arguments, tmp_path, capsys)
    assert onbeat(arguments) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "out" / HISTORY_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["flow"] < 0.8 * rows[0]["flow"]
    assert rows[-1]["text"] < 0.5 * rows[0]["text"]
    assert rows[-1]["held_out_flow"] < rows[0]["held_out_flow"]
    assert all(row["held_out_text"] > 0 for row in rows), "a question is held out"
    assert not any("held_out_place" in row for row in rows), "no dataset tells the object's place"
    assert 0.8 < rows[-1]["balance"] < 2.0
    check_curves(tmp_path / "out" / CURVES_FOLDER)
    config = load_checkpoint(tmp_path / "out").config
    assert config.delay.longest == 3
    assert config.adapters
    bundle = ["export", str(tmp_path / "out"), str(tmp_path / "bundle"), "--embodiment", "so101"]
    assert onbeat([*bundle, "--variant", "so101", "--json"]) == 0  # which compares ONNX with PyTorch on the way
    assert onbeat([*bundle, "--variant", "so101", "--replace", "--tolerance", "0"]) == 1, "so a difference would tell"


def check_rehearsal(arguments: list[str], folder: Path, capsys) -> None:
    """The plan: mixture, parts, memory and time; and nothing is written."""
    assert onbeat([*arguments, "--dry-run"]) == 0
    figures, plan = capsys.readouterr()
    assert json.loads(figures)["step_s"] > 0
    assert json.loads(figures)["memory_mib"] > 0
    for told in ("MiB", "arm", "hand", "experts", "routers", "adapters", "active slots", "60 steps of 20", "samples/s"):
        assert told in plan
    assert [path.name for path in folder.iterdir()] == ["recipe.toml"]


def check_curves(folder: Path) -> None:
    """What TensorBoard's own reader finds."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {f"loss/{part}" for part in ("flow", "text", "place", "balance")} <= names
    assert {"learning_rate", "gradient_norm", "samples_per_s", "flow/so101", "flow/hand/wave"} <= names
    assert {"routing_entropy/so101", "expert_use/hand/layer1/expert2", "held_out_flow"} <= names
    assert [event.step for event in events.Scalars("loss/flow")] == list(range(1, 61))
    use = [events.Scalars(f"expert_use/so101/layer0/expert{expert}")[-1].value for expert in range(3)]
    assert sum(use) == pytest.approx(1.0, abs=1e-5)
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-3)


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "onbeat", "train", str(recipe), "--out", str(out), *more]


def reports(out: Path) -> list[dict[str, float]]:
    path = out / HISTORY_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_a_run_killed_at_any_step_resumes_to_the_same_losses(mixture: Path, tmp_path: Path) -> None:
    """Killed somewhere in or between the steps after a report, then taken to the end by another process."""
    recipe, out = write_recipe(tmp_path, mixture, steps=10, report_steps=2), tmp_path / "killed"
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    assert onbeat(command(recipe, tmp_path / "straight")[3:]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(recipe, out), env=environment, stderr=subprocess.DEVNULL)
    patience, killed_after = time.monotonic() + 120, rng.integers(1, 4)
    while len(reports(out)) < killed_after and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert onbeat(command(recipe, out, "--resume")[3:]) == 0
    for ours, theirs in zip(reports(out), reports(tmp_path / "straight"), strict=True):
        assert {**ours, "elapsed_s": 0} == pytest.approx({**theirs, "elapsed_s": 0}, rel=1e-5), ours["step"]
    weights, expected = (load_checkpoint(folder).state_dict() for folder in (out, tmp_path / "straight"))
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in expected.items())
