"""The trainer: it learns, it is deterministic, it resumes, and what it writes is what it learnt."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onbeat.cli import main as onbeat
from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.observation import Observation
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.colours import draw_colours
from onbeat.training.dataset import Steps
from onbeat.training.feed import EpochOrder
from onbeat.training.fit import Fit, Losses
from onbeat.training.journal import HISTORY_FILE
from onbeat.training.prepare import Prepared, prepare, start_fit
from onbeat.training.recipe import Recipe, load_recipe, parse_recipe
from onbeat.training.resume import ResumeError
from onbeat.training.torch_engine import build_engine, open_engine
from onbeat.training.train import run
from onbeat.training.validation import held_out_groups, measure_fit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIRST_LOSSES = ((1.6361485720, 1.3943767548, 10.2390575), (1.6638950109, 1.2612869740, 11.8514853))
SHIPPED = Path(__file__).parents[2] / "training" / "configs" / "so101_lift.toml"


@pytest.fixture
def prepared(tiny_recipe, demonstrations, tmp_path) -> Prepared:
    return prepare(tiny_recipe, demonstrations, tmp_path)


def fit_of(recipe: Recipe, prepared: Prepared) -> Fit:
    torch.set_num_threads(1)
    return start_fit(recipe, prepared)


def test_the_same_seed_takes_the_same_steps_and_another_does_not(tiny_recipe: Recipe, prepared: Prepared) -> None:
    first, again = fit_of(tiny_recipe, prepared), fit_of(tiny_recipe, prepared)
    other = fit_of(replace(tiny_recipe, seed=4), prepared)
    losses = [first.advance() for _ in range(3)]
    assert [again.advance() for _ in range(3)] == losses
    assert other.advance() != losses[0]


@pytest.mark.slow
def test_the_shipped_recipe_starts_with_the_losses_it_had(write_folder, demonstrate_at, tmp_path: Path) -> None:
    """As the trainer computed them before it knew mixtures, experts and gates: flow, place and gradient norm."""
    (tmp_path / "demonstrations").mkdir()
    write_folder(tmp_path / "demonstrations", [demonstrate_at(seed, 112) for seed in range(4)])
    recipe = load_recipe(SHIPPED)
    fit = fit_of(recipe, prepare(recipe, tmp_path / "demonstrations", tmp_path / "out"))
    for flow, place, norm in FIRST_LOSSES:
        losses = fit.advance()
        # To 1e-6 on the machine that recorded them; other processors add up in another order.
        assert (losses.flow, losses.place) == pytest.approx((flow, place), abs=1e-5)
        assert losses.norm == pytest.approx(norm, rel=1e-4)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tiny_recipe: Recipe, prepared: Prepared, tmp_path) -> None:
    straight = fit_of(tiny_recipe, prepared)
    for _ in range(3):
        straight.advance()
    straight.save(tmp_path)
    resumed = fit_of(tiny_recipe, prepared)
    resumed.resume(tmp_path)
    assert resumed.step == 3
    assert [resumed.advance() for _ in range(3)] == [straight.advance() for _ in range(3)]
    assert_same_weights(resumed.average, straight.average)


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_goes_on_later(
    tiny_recipe: Recipe, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, handlers = fit_of(tiny_recipe, prepared), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    advance = fit.advance

    def asked_at_the_third() -> Losses:
        if fit.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return advance()

    monkeypatch.setattr(fit, "advance", asked_at_the_third)
    run(fit, prepared, tmp_path)
    resumed = fit_of(tiny_recipe, prepared)
    resumed.resume(tmp_path)
    assert resumed.step == 3
    assert_same_weights(resumed.policy, fit.policy)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_resuming_nothing_or_another_recipe_is_refused(tiny_recipe: Recipe, prepared: Prepared, tmp_path) -> None:
    fit = fit_of(tiny_recipe, prepared)
    with pytest.raises(ResumeError, match="cannot be read"):
        fit.resume(tmp_path / "nowhere")
    fit.save(tmp_path)
    with pytest.raises(ResumeError, match="another recipe"):
        fit_of(replace(tiny_recipe, seed=9), prepared).resume(tmp_path)


def test_every_observation_comes_once_per_epoch() -> None:
    order = EpochOrder(count=100, batch=16, seed=3)
    epochs = [[draw.sample for step in range(6 * e, 6 * e + 6) for draw in order.draws(step)] for e in (0, 1)]
    assert all(len(set(epoch)) == 96 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_unused_slots_stay_silent(tiny_recipe: Recipe, prepared: Prepared) -> None:
    fit = fit_of(tiny_recipe, prepared)
    for _ in range(3):
        fit.advance()
    unused = ~fit.objective.moved
    assert bool((fit.policy.action_encoder.W1.weight[:, unused] == 0).all())
    assert bool((fit.policy.action_decoder.layer2.weight[unused] == 0).all())
    assert bool((fit.policy.action_decoder.layer2.bias[unused] == 0).all())


def test_every_weight_that_matters_learns(tiny_recipe: Recipe, prepared: Prepared) -> None:
    """Only what no action depends on has no gradient: the last und block past its keys and values, and the und norm."""
    fit = fit_of(tiny_recipe, prepared)
    fit.advance()
    fit.advance()
    idle = {name for name, p in fit.policy.named_parameters() if p.grad is None or not bool(p.grad.any())}
    last = tiny_recipe.network.layers - 1
    past = ("q_proj", "q_norm", "o_proj", "mlp", "post_attention_layernorm")
    expected = {"language_model.norm.und.weight"} | {
        name
        for name, _ in fit.policy.named_parameters()
        if name.startswith(f"language_model.layers.{last}.und.") and any(part in name for part in past)
    }
    assert idle == expected


@pytest.mark.slow
def test_it_learns_and_what_it_writes_is_what_it_learnt(tiny_recipe: Recipe, demonstrations, tmp_path) -> None:
    fitting = replace(tiny_recipe.fitting, steps=300, report_steps=150, jitter=0.0, ema_decay=0.98)
    recipe = replace(tiny_recipe, fitting=fitting)
    prepared = prepare(recipe, demonstrations, tmp_path)
    fit, fitted = fit_of(recipe, prepared), held_out_groups(prepared.sources)
    untrained = measure_fit(fit, fitted, prepared.languages)
    run(fit, prepared, tmp_path)
    trained = measure_fit(fit, fitted, prepared.languages)
    assert trained["flow"] < 0.3 * untrained["flow"]
    assert trained["error_arm_joints"] < 0.5 * untrained["error_arm_joints"]
    assert trained["error_gripper"] < 0.5 * untrained["error_gripper"]
    assert trained["place"] < 0.5 * untrained["place"]
    history = [json.loads(line) for line in (tmp_path / HISTORY_FILE).read_text().splitlines()]
    assert [row["step"] for row in history] == [150, 300]
    assert_same_weights(load_checkpoint(tmp_path), fit.average)
    assert_same_actions(fit, prepared, tmp_path)


def test_a_checkpoint_loads_and_acts_as_in_memory(tiny_recipe: Recipe, prepared: Prepared, tmp_path) -> None:
    fit = fit_of(tiny_recipe, prepared)
    fit.advance()
    fit.save(tmp_path)
    for name, tensor in load_checkpoint(tmp_path / ".").state_dict().items():
        assert torch.equal(tensor, fit.average.state_dict()[name]), name
    assert_same_actions(fit, prepared, tmp_path)


def test_jitter_changes_colours_within_bounds_and_not_without() -> None:
    pixels = torch.full((2, 2, 3, 4, 4), 2.0)
    generator = torch.Generator().manual_seed(0)
    assert draw_colours(2, 2, 0.0, generator) is None
    colours = draw_colours(2, 3, 0.1, generator)
    assert colours is not None
    changed = colours.apply(pixels)
    assert (changed - pixels).abs().max() <= 0.1 * 2 + 0.1 + 1e-6
    assert not torch.equal(changed[0, 0], changed[0, 1])
    assert bool((changed.std((-1, -2)) < 1e-6).all()), "one gain and offset per channel"
    more = colours.apply(pixels[:, :1].expand(2, 5, 3, 4, 4))
    assert torch.equal(more[:, 3:], more[:, :2]), "an image more than any robot has views"


def test_the_command_trains_resumes_and_tells(demonstrations: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'embodiment = "so101"\ndataset = "tiny"\nseed = 1\n[network]\nimage_size = 28\nlayers = 1\nvision_layers = 1\n'
        "[fitting]\nsteps = 4\nbatch = 8\ndraws = 1\nreport_steps = 2\nthreads = 1\n"
    )
    arguments = ["train", str(recipe), "--data", str(demonstrations), "--out", str(tmp_path / "out"), "--json"]
    assert onbeat(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == 4
    assert np.isfinite([told["flow"], told["error_gripper"]]).all()
    assert onbeat([*arguments, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert onbeat(arguments) == 1
    assert "--resume" in capsys.readouterr().err
    assert open_engine(tmp_path / "out", views=2).spec.trained_delay == 0


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys) -> None:
    assert onbeat(["train", str(SHIPPED), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "info.json" in capsys.readouterr().err
    assert onbeat(["train", str(tmp_path / "none.toml")]) == 1
    assert "none.toml" in capsys.readouterr().err


WHOLE = {"embodiment": "so101", "dataset": "d", "seed": 1}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**WHOLE, "sed": 1}, "unknown key 'sed': did you mean 'seed'"),
        ({"embodiment": "so101", "dataset": "d"}, "seed is missing: give a int"),
        ({**WHOLE, "fitting": {"step": 3}}, "did you mean 'steps'"),
        ({**WHOLE, "fitting": {"steps": 0}}, "steps is 0"),
        ({**WHOLE, "fitting": {"steps": True}}, "steps is True"),
        ({**WHOLE, "fitting": {"held_out": 1.0}}, "held_out is 1.0"),
        ({**WHOLE, "fitting": {"batch": 4, "accumulate": 5}}, "give at most batch, which is 4"),
        ({**WHOLE, "fitting": {"device": "tpu"}}, "give one of cpu, cuda"),
        ({**WHOLE, "data": {"sources": {}}}, "give either embodiment"),
        ({"dataset": "d", "seed": 1, "data": {"sources": {"a": {"path": "p"}}}}, "kind is missing"),
        ({"dataset": "d", "seed": 1, "data": {"sources": {}, "simulaton_cap": 1}}, "did you mean 'simulation_cap'"),
        ({**WHOLE, "network": {"image_size": "112"}}, "image_size is '112'"),
        ({**WHOLE, "network": {"experts": {"count": 2}}}, r"\[?network.experts.*foundation_layers is missing"),
        ({**WHOLE, "network": {"experts": {"cuont": 2}}}, "did you mean 'count'"),
        ({**WHOLE, "network": {"gate": {"first_pass": "none"}}}, "give one of published, projected"),
        ({**WHOLE, "frozen": {"preset": "new-robto"}}, "did you mean 'new-robot'"),
        ({**WHOLE, "frozen": {"parts": {"visoin": "frozen"}}}, "did you mean 'vision'"),
        ({**WHOLE, "frozen": {"parts": {"vision": "active slots"}}}, "vision has no slots"),
        ({**WHOLE, "delays": {"so101": {"latencies": [[1, 2]]}}}, "period_ms is missing"),
        ({**WHOLE, "delays": {"so101": {"period_ms": 5, "latencies": 3}}}, "latencies is 3: give a list"),
        ({**WHOLE, "fitting": 3}, "fitting is 3: give a table"),
    ],
)
def test_a_wrong_recipe_is_named(document: dict, message: str) -> None:
    with pytest.raises(OnbeatError, match=message):
        parse_recipe(document, "r.toml")


def test_the_recipe_of_the_readme_is_one() -> None:
    text = (SHIPPED.parents[1] / "README.md").read_text(encoding="utf-8")
    recipe = parse_recipe(tomllib.loads(text.split("```toml\n")[1].split("```")[0]), "README.md")
    assert recipe.data is not None
    assert recipe.frozen.treatment("vision") == "frozen"
    assert recipe.frozen.treatment("gate") == "trained"


@pytest.mark.parametrize("path", sorted(SHIPPED.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_makes_a_network(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.network.configure(vocabulary=400, robots=recipe.delays).delay.longest >= 4


def test_a_whole_number_is_a_rate_too() -> None:
    assert parse_recipe({**WHOLE, "fitting": {"peak_rate": 1}}, "r.toml").fitting.peak_rate == 1.0


def test_the_shipped_recipe_makes_a_network_that_locks_prefixes() -> None:
    recipe = load_recipe(SHIPPED)
    config = recipe.network.configure(vocabulary=400)
    assert config.delay.longest >= 4
    assert not config.gate.present
    assert config.decoder.experts is None
    assert not config.adapters
    assert config.decoder.rope == "fp32"


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_actions(fit: Fit, prepared: Prepared, folder: Path) -> None:
    steps, language = prepared.sources[0], prepared.languages["so101"]
    assert isinstance(steps, Steps)
    frames = steps.frames[5]
    views = {name: Frame(0, 0, rgb) for name, rgb in zip(("top", "wrist"), frames, strict=True)}
    joints = {"arm_joints": np.zeros(5), "gripper": np.zeros(1)}
    inputs = language.inputs(Observation(views, joints, 0), steps.task)
    written, kept = open_engine(folder, views=2), build_engine(fit.average, views=2)
    noise = np.random.default_rng(0).standard_normal((1, written.spec.chunk, 200), dtype=np.float32)
    actions = [engine.flow(engine.prefix(inputs), noise).actions for engine in (written, kept)]
    # The same weights at other addresses may take another vector path: a few units in the last place.
    assert np.abs(actions[0] - actions[1]).max() < 1e-5
