"""The flow loss and its draws, against numbers worked out by hand."""

import math

import pytest
import torch

from onbeat.training.losses import CLEAN_BUCKET, FlowDistribution, draw_flow_task, flow_loss, flow_task, warm_up_cosine


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_mix_target_and_bucket_of_one_element() -> None:
    actions, noise = torch.tensor([[[2.0]]]), torch.tensor([[[[-1.0]]]])
    task = flow_task(actions, _all((1, 1, 1)), noise, torch.tensor([[[0.2509]]]), _none((1, 1, 1)))
    assert task.noisy.item() == pytest.approx(0.7491 * -1 + 0.2509 * 2)
    assert task.target.item() == 3.0
    assert task.bucket.item() == 250  # truncated, not rounded


def test_given_rows_are_clean_at_the_last_bucket_and_not_counted() -> None:
    actions = torch.arange(3.0).view(1, 3, 1)
    given = torch.tensor([[[True, True, False]]])
    task = flow_task(actions, _all((1, 3, 1)), torch.full((1, 1, 3, 1), 9.0), torch.zeros(1, 1, 3), given)
    assert task.noisy.flatten().tolist() == [0.0, 1.0, 9.0]
    assert task.bucket.flatten().tolist() == [CLEAN_BUCKET, CLEAN_BUCKET, 0]
    assert task.counted.flatten().tolist() == [False, False, True]


def test_slots_that_are_not_valid_enter_as_zero_and_are_not_counted() -> None:
    valid = torch.tensor([[[True, False]]])
    task = flow_task(
        torch.ones(1, 1, 2), valid, torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1), 0.5), _none((1, 1, 1))
    )
    assert task.noisy.flatten().tolist() == [3.0, 0.0]
    assert flow_loss(torch.tensor([[[[-3.0, 100.0]]]]), task).item() == 1.0  # target 1 - 5 = -4, off by 1


def test_loss_is_the_mean_over_counted_elements_only() -> None:
    valid = torch.tensor([[[True], [True], [False]]])
    task = flow_task(torch.zeros(1, 3, 1), valid, torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3), _none((1, 1, 3)))
    assert flow_loss(torch.tensor([1.0, 3.0, 50.0]).view(1, 1, 3, 1), task).item() == 5.0


def test_nothing_counted_is_zero_and_gives_no_gradient() -> None:
    velocity = torch.ones(1, 1, 1, 1, requires_grad=True)
    task = flow_task(
        torch.zeros(1, 1, 1), _none((1, 1, 1)), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), _none((1, 1, 1))
    )
    loss = flow_loss(velocity, task)
    loss.backward()
    assert loss.item() == 0.0
    assert velocity.grad is not None
    assert velocity.grad.item() == 0.0


def test_times_follow_the_published_distribution() -> None:
    """u ~ Beta(1.5, 1): P(u <= x) = x^1.5, so P(t >= 0.5) = P(u <= 0.4995) = 0.353; mean t = 1 - 0.6 / 0.999."""
    t = FlowDistribution().times((200_000,), generator())
    assert t.min().item() >= 0.0
    assert t.max().item() <= 1.0
    assert (t >= 0.5).float().mean().item() == pytest.approx(0.4995**1.5, abs=0.005)  # four standard errors
    assert t.mean().item() == pytest.approx(1 - 0.6 / 0.999, abs=0.003)


def test_delay_weights_are_the_published_two() -> None:
    weights = FlowDistribution(delays=3).delay_weights().tolist()
    total = math.e**2 + math.e + 1
    assert weights == pytest.approx([math.e**2 / total, math.e / total, 1 / total])
    assert FlowDistribution(delays=4, delay_exponential=False).delay_weights().tolist() == [0.25] * 4


@pytest.mark.parametrize("delays", [0, 1])
def test_without_delays_every_row_is_asked(delays: int) -> None:
    task = _drawn(delays=delays)
    assert bool(task.counted.all())
    assert int(task.bucket.max()) <= CLEAN_BUCKET


def test_delays_lock_leading_rows_and_never_all() -> None:
    counted = _drawn(delays=4).counted[..., 0]
    locked = (~counted).sum(-1)
    assert set(locked.flatten().tolist()) == {0, 1, 2, 3}
    assert bool((counted.long().diff(dim=-1) >= 0).all()), "a locked row came after a free one"


def test_the_same_seed_draws_the_same_task() -> None:
    assert torch.equal(_drawn(delays=4, seed=3).noisy, _drawn(delays=4, seed=3).noisy)
    assert not torch.equal(_drawn(delays=4, seed=3).noisy, _drawn(delays=4, seed=4).noisy)


def test_warm_up_then_half_a_cosine() -> None:
    rate = [warm_up_cosine(step, warm_up=4, total=12) for step in range(13)]
    assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rate[8] == pytest.approx(0.5)
    assert rate[12] == pytest.approx(0.0, abs=1e-12)
    assert warm_up_cosine(40, warm_up=4, total=12, floor=0.1) == pytest.approx(0.1)
    assert warm_up_cosine(0, warm_up=0, total=12) == 1.0


def _none(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def _all(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _drawn(delays: int, seed: int = 0):
    actions = torch.ones(64, 5, 2)
    distribution = FlowDistribution(delays=delays, delay_exponential=False)
    return draw_flow_task(actions, torch.ones_like(actions, dtype=torch.bool), 3, distribution, generator(seed))
