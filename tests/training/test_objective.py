"""The forward pass of a step: what the gate, the delays and questions in words add, and what must change nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onbeat.runtime.prompt import Prompt
from onbeat.training.batch import cut_groups, group_samples
from onbeat.training.config import DelayConfig, ExpertsConfig
from onbeat.training.data.sample import Sample
from onbeat.training.fit import Fit
from onbeat.training.losses import CLEAN_BUCKET, NOT_ASKED
from onbeat.training.model.policy import Policy, create_policy
from onbeat.training.model.sampler import encode_anchor
from onbeat.training.objective import Objective, training_refine
from onbeat.training.prepare import Prepared, prepare, start_fit
from onbeat.training.random_checkpoint import random_policy
from onbeat.training.recipe import Fitting, Gate, Recipe

MOVED = torch.arange(200) < 3


@pytest.fixture
def prepared(tiny_recipe: Recipe, demonstrations: Path, tmp_path: Path) -> Prepared:
    return prepare(tiny_recipe, demonstrations, tmp_path)


def fit_of(recipe: Recipe, prepared: Prepared, **fitting: object) -> Fit:
    torch.set_num_threads(1)
    return start_fit(replace(recipe, fitting=replace(recipe.fitting, **fitting)), prepared)


def gated_policy(recipe: Recipe, **gate: object) -> Policy:
    network = replace(recipe.network, und_width=24, gate=replace(Gate(), **gate), chunk=3)
    return random_policy(network.configure(vocabulary=50), seed=1)


def sample_of(tokens: int, *, text: tuple[int, ...] = (), valid: bool = True) -> Sample:
    rng = np.random.default_rng(tokens)
    return Sample(
        frames=rng.integers(0, 256, (1, 3, 28, 28), dtype=np.uint8),
        state=np.zeros(200, np.float32),
        actions=rng.standard_normal((3, 200), np.float32) * MOVED.numpy(),
        valid=np.broadcast_to(MOVED.numpy() & valid, (3, 200)),
        prompt=Prompt(np.arange(tokens) % 50, 1, 3),
        embodiment="arm" if valid else "none",
        task="task",
        kind="robot" if valid else "vision_language",
        text=np.array(text, np.int64) if text else None,
    )


def test_parts_of_a_batch_add_up_to_the_whole(tiny_recipe: Recipe, prepared: Prepared) -> None:
    whole, parts = fit_of(tiny_recipe, prepared), fit_of(tiny_recipe, prepared, accumulate=3)
    for _ in range(2):
        assert parts.advance() == pytest.approx(whole.advance(), abs=1e-5)
    for ours, theirs in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-4  # AdamW's first steps have the gradient's sign alone


@pytest.mark.parametrize("routed", [False, True])
def test_layers_computed_again_have_the_same_gradients(routed: bool, tiny_recipe: Recipe, prepared: Prepared) -> None:
    network = replace(tiny_recipe.network, und_width=24, experts=ExpertsConfig(1, 3, 2), gate=Gate())
    recipe = replace(tiny_recipe, network=network) if routed else tiny_recipe
    kept, again = fit_of(recipe, prepared), fit_of(recipe, prepared, recompute=True)
    assert again.advance() == kept.advance()
    for (name, ours), theirs in zip(kept.policy.named_parameters(), again.policy.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_products_in_bfloat16_are_near_and_weights_stay_float32(tiny_recipe: Recipe, prepared: Prepared) -> None:
    full, half = fit_of(tiny_recipe, prepared), fit_of(tiny_recipe, prepared, precision="bfloat16")
    ours, theirs = full.advance(), half.advance()
    assert theirs.flow != ours.flow
    assert theirs.flow == pytest.approx(ours.flow, rel=0.02)
    kinds = {p.dtype for p in half.policy.parameters()} | {
        m.dtype for s in half.optimiser.state.values() for m in s.values()
    }
    assert kinds == {torch.float32}


def test_the_gate_is_anchored_on_what_was_done(tiny_recipe: Recipe) -> None:
    policy = gated_policy(tiny_recipe)
    generator = torch.Generator().manual_seed(0)
    actions, features = torch.randn(2, 3, 200, generator=generator), torch.randn(2, 2, 3, 24, generator=generator)
    directions = torch.randn(32, 24, generator=generator)
    plain = torch.tensor([[True, False], [False, True]])
    refined = training_refine(policy, actions, plain, directions)(features)
    assert policy.mpg is not None
    expected = policy.mpg(
        features[0, 1], encode_anchor(policy, actions[0]), directions, strength=0.1, temperature=1.0
    ).features
    assert torch.allclose(refined[0, 1], expected, atol=1e-6)
    assert torch.equal(refined[plain], policy.mpg.project(features[plain]))
    other = training_refine(policy, actions.flip(0), plain, directions)(features)
    assert not torch.allclose(other[~plain], refined[~plain], atol=1e-6), "the anchor decides"
    assert torch.equal(other[plain], refined[plain])


@pytest.mark.parametrize("stop", [True, False])
def test_no_gradient_passes_the_gate_where_it_is_stopped(stop: bool, tiny_recipe: Recipe) -> None:
    policy = gated_policy(tiny_recipe, stop_gradient=stop)
    features = torch.randn(1, 1, 3, 24, generator=torch.Generator().manual_seed(0))
    refine = training_refine(policy, torch.ones(1, 3, 200), torch.tensor([[False]]), torch.eye(24))
    refine(features).square().sum().backward()
    assert policy.mpg is not None
    assert (policy.mpg.action_proj.weight.grad is None) == stop
    assert policy.mpg.enhancement_proj.weight.grad is not None


def test_rows_before_the_delay_are_given_clean_and_neither_counted_nor_learnt_from(tiny_recipe: Recipe) -> None:
    policy = gated_policy(tiny_recipe)
    config = replace(policy.config, delay=DelayConfig(True, 3, exponential=False))
    objective = Objective(config, Fitting(draws=50), moved=MOVED, views=1)
    group = group_samples([sample_of(8)], torch.arange(1))[0]
    draws = objective.draw(["arm"], torch.Generator().manual_seed(0), jitter=0.0)
    asked = objective.ask(group, draws)
    given = torch.arange(3) < draws.flow.delay[0, :, None]
    assert torch.bincount(draws.flow.delay[0]).tolist() == pytest.approx([50 / 3] * 3, abs=12)
    assert bool((asked.task.bucket[0][given] == CLEAN_BUCKET).all())
    assert bool((asked.task.bucket[0][~given] < CLEAN_BUCKET).all())
    assert torch.equal(asked.task.noisy[0][given], group.actions.expand(50, 3, 200)[given])
    assert not bool(asked.task.counted[0][given].any())
    assert bool(asked.task.counted[0][~given][:, MOVED].all())


def test_words_teach_the_understanding_stream_alone(tiny_recipe: Recipe) -> None:
    policy = create_policy(replace(tiny_recipe.network, chunk=3).configure(vocabulary=50), seed=1)
    objective = Objective(policy.config, Fitting(draws=1, text_weight=1.0), moved=MOVED, views=1, asks_words=True)
    samples = [sample_of(8, text=(5, 6, 7), valid=False), sample_of(9, text=(4,), valid=False), sample_of(8)]
    groups = group_samples(samples, torch.arange(3))
    draws = objective.draw(["none", "none", "arm"], torch.Generator().manual_seed(0), 0.0)
    asked = [objective.ask(group, draws) for group in groups]
    answered = objective.answer(policy, asked)
    assert [name for group in answered.groups for name in group.embodiments] == ["arm", "none", "none"]
    assert answered.entries.text.tolist() == [0, 3, 1]
    assert answered.errors.flow[1:].tolist() == [0, 0]
    assert answered.errors.flow[0] > 0
    assert (answered.errors.text / answered.entries.text)[1:].tolist() == pytest.approx([np.log(50)] * 2, rel=0.1)
    answered.errors.text.sum().backward()
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"vit_model", "connector", "language_model", "state_encoder"}
    last = policy.language_model.stack[-1]
    assert last.und.mlp.down_proj.weight.grad is not None, "the last layer is whole for words"
    assert last.gen.self_attn.q_proj.weight.grad is None or not last.gen.self_attn.q_proj.weight.grad.any()


def test_a_run_that_asks_for_words_makes_that_pass_even_without_any(tiny_recipe: Recipe) -> None:
    """So that processes whose shares differ make the same passes."""
    policy = create_policy(replace(tiny_recipe.network, chunk=3).configure(vocabulary=50), seed=1)
    objective = Objective(policy.config, Fitting(draws=1), moved=MOVED, views=1, asks_words=True)
    group = group_samples([sample_of(8)], torch.arange(1))[0]
    draws = objective.draw(["arm"], torch.Generator().manual_seed(0), 0.0)
    answered = objective.answer(policy, [objective.ask(group, draws)])
    assert answered.errors.text.tolist() == [0]
    assert answered.errors.text.requires_grad


def test_samples_of_one_shape_are_one_group_whatever_their_answers() -> None:
    samples = [sample_of(8, text=(5, 6, 7)), sample_of(9), sample_of(8, text=(4,))]
    groups = group_samples(samples, torch.tensor([4, 5, 6]))
    assert [group.rows.tolist() for group in groups] == [[4, 6], [5]]
    assert groups[0].answer.tolist() == [[5, 6, 7], [4, NOT_ASKED, NOT_ASKED]]
    assert groups[1].answer.shape == (1, 0)
    parts = cut_groups(groups, 2)
    assert [[group.rows.tolist() for group in part] for part in parts] == [[[4, 6]], [[5]]]
    assert parts[1][0].tasks == ("task",)
