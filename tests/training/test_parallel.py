"""Two processes are one: started by torchrun, they come to the same losses, weights, moments and average."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from onbeat.training import parallel
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.journal import CURVES_FOLDER, HISTORY_FILE
from onbeat.training.train import main as train

WORKER = Path(__file__).with_name("two_processes.py")
ROOT = Path(__file__).parents[2]
AGREEMENT = 1e-5  # losses, weights, moments; the smallest of the mistakes moves 20 times as much


RECIPE = """
embodiment = "so101"
dataset = "tiny"
seed = 1
[network]
image_size = 28
layers = 2
vision_layers = 1
[fitting]
steps = 2
batch = 9 # 5 and 4
draws = 1
report_steps = 2
threads = 1
"""


def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(WORKER.stem, WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process came to."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    worker().straight(folder)
    worker().precise(folder)
    return folder


@pytest.fixture(scope="module")
def both(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two came to, and what they came to in wrong ways."""
    folder = tmp_path_factory.mktemp("both")
    torchrun(str(WORKER), str(folder), str(alone))
    return folder


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]


def differences(one: Path, other: Path) -> dict[str, float]:
    """Largest difference by tensor, where there is any, and of the losses and norms from the last step of both back."""
    ours, theirs = (load_file(path.with_suffix(".safetensors")) for path in (one, other))
    assert ours.keys() == theirs.keys()
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].numel()}
    told = [torch.tensor(json.loads(path.with_suffix(".json").read_text())) for path in (one, other)]
    steps = min(map(len, told))
    return {**apart, "loss and norm": float((told[0][-steps:] - told[1][-steps:]).abs().max())}


def wrong(one: Path, other: Path) -> dict[str, float]:
    return {name: apart for name, apart in differences(one, other).items() if apart > AGREEMENT}


def curves(folder: Path) -> dict[str, float]:
    """The last value of each curve that has no clock in it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name != "samples_per_s"]
    return {name: events.Scalars(name)[-1].value for name in names}


@pytest.mark.slow
def test_twenty_steps_of_two_processes_are_those_of_one(alone: Path, both: Path) -> None:
    assert wrong(alone / "last", both / "last") == {}
    moved = differences(alone / "early", alone / "last")
    assert all(moved[name] > 0 for name in moved if name.startswith("average.vit_model.encoder"))
    assert moved["policy.vit_model.embeddings.patch_embedding.weight"] == 0, "frozen"
    assert moved["policy.language_model.layers.0.gen.mlp.up_proj.weight"] == 0, "frozen"


@pytest.mark.slow
def test_even_what_has_no_gradient_but_rounding_agrees_in_float64(alone: Path, both: Path) -> None:
    """The key's part of the vision tower's qkv bias: softmax does not see it, AdamW steps on its rounding."""
    apart = differences(alone / "precise", both / "precise")
    assert any(name.endswith("qkv.bias") for name in apart)
    assert wrong(alone / "precise", both / "precise") == {}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["local-count", "local-norm", "untouched-moves"])
def test_each_mistake_shows(alone: Path, both: Path, mistake: str) -> None:
    assert wrong(alone / "early", both / "early") == {}
    assert max(wrong(alone / "early", both / mistake).values()) > 20 * AGREEMENT


@pytest.mark.slow
@pytest.mark.parametrize("form", ["from-shares", "from-gathered"])
def test_two_processes_go_on_from_what_one_left(alone: Path, both: Path, form: str) -> None:
    assert wrong(alone / "later", both / form) == {}


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_left(alone: Path, both: Path, tmp_path: Path) -> None:
    module = worker()
    for shares in (True, False):
        module.write(module.resumed(both, shares=shares), tmp_path, "later")
        assert wrong(alone / "later", tmp_path / "later") == {}


@pytest.mark.slow
def test_their_checkpoint_is_a_published_one(both: Path) -> None:
    policy, weights = load_checkpoint(both / "checkpoint"), load_file(both / "last.safetensors")
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, weights[f"average.{name}"]), name


@pytest.mark.slow
def test_the_command_writes_one_checkpoint_and_one_history(demonstrations: Path, tmp_path: Path) -> None:
    recipe, one, two = tmp_path / "tiny.toml", tmp_path / "one", tmp_path / "two"
    recipe.write_text(RECIPE)
    arguments = [str(recipe), "--data", str(demonstrations), "--out"]
    assert train([*arguments, str(one)]) == 0
    torchrun("-m", "onbeat", "train", *arguments, str(two))
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    ours, theirs = (load_file(folder / "resume" / "fit.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=AGREEMENT) for name in ours)
    ours, theirs = (curves(folder / CURVES_FOLDER) for folder in (one, two))
    assert "flow/so101" in ours
    assert ours == pytest.approx(theirs, rel=1e-5), "of all processes, by robot and task too"
    rows = [json.loads((folder / HISTORY_FILE).read_text()) for folder in (one, two)]
    assert {**rows[0], "elapsed_s": 0} == pytest.approx({**rows[1], "elapsed_s": 0}, rel=1e-5)


def test_alone_nothing_changes() -> None:
    module = nn.Linear(3, 2)
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parallel.shard(module)
    with parallel.joined(), parallel.whole(module):
        assert (parallel.rank(), parallel.world()) == (0, 1)
        parallel.barrier()
    gathered = parallel.gather(module.state_dict())
    assert all(torch.equal(gathered[name], tensor) for name, tensor in kept.items())
    assert gathered["weight"].data_ptr() != module.weight.data_ptr(), "a copy, which steps taken meanwhile leave alone"
    assert parallel.spread(kept, module.state_dict()) == kept
    assert parallel.share(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_a_global_sum_has_no_gradient_and_its_own_memory() -> None:
    counted = torch.tensor([2.0, 3.0], requires_grad=True)
    total = parallel.global_sum(counted)
    assert not total.requires_grad
    total += 1
    assert counted.tolist() == [2.0, 3.0]


def test_gradients_are_clipped_to_the_limit_and_zeros_stay_alone() -> None:
    module = nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(parallel.clip_gradients(module.parameters(), 1.0)) == pytest.approx(5.0)
    assert module.weight.grad.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    module.weight.grad.zero_()
    parallel.leave_untouched(module)
    assert module.weight.grad is not None


def test_the_average_follows() -> None:
    average, newest = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = [0.75 * a + 0.25 * n for a, n in zip(average.parameters(), newest.parameters(), strict=True)]
    parallel.follow(average, newest, 0.75)
    assert all(torch.allclose(a, e) for a, e in zip(average.parameters(), expected, strict=True))


def test_shares_written_alone_are_read_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b.step": torch.tensor(7.0)}
    parallel.save_shares(tensors, tmp_path / "shares")
    like = {"a": torch.zeros(3, 2), "b.step": torch.zeros(()), "not written": torch.ones(1)}
    read = parallel.load_shares(tmp_path / "shares", like)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
