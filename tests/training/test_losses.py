"""The losses and their draws, against numbers worked out by hand."""

import math

import pytest
import torch
from scipy import stats

from onbeat.training.config import DelayConfig, RobotDelay
from onbeat.training.delays import Delays
from onbeat.training.losses import (
    CLEAN_BUCKET,
    NOT_ASKED,
    Drawn,
    FlowDistribution,
    FlowTask,
    draw_flow,
    flow_error,
    flow_task,
    text_error,
    warm_up_cosine,
)

ROBOTS = {"a": RobotDelay(50.0, probabilities=(0.0, 0.75, 0.25)), "b": RobotDelay(20.0, latencies=((10, 1), (70, 3)))}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task_of(actions: torch.Tensor, noise: float, time: float, delay: int = 0, **masks: torch.Tensor) -> FlowTask:
    """One observation of one draw; actions (C, A)."""
    noises = torch.full((1, 1, *actions.shape), noise)
    drawn = Drawn(noises, torch.tensor([[time]]), torch.tensor([[delay]]), torch.tensor([[False]]))
    valid = masks.get("valid", torch.ones_like(actions, dtype=torch.bool))
    moved = masks.get("moved", torch.ones(actions.shape[1], dtype=torch.bool))
    return flow_task(actions[None], valid[None], moved, drawn)


def test_noise_mix_target_and_bucket_of_one_element() -> None:
    task = task_of(torch.tensor([[2.0]]), noise=-1.0, time=0.2509)
    assert task.noisy.item() == pytest.approx(0.7491 * -1 + 0.2509 * 2)
    assert task.target.item() == 3.0
    assert task.bucket.item() == 250  # truncated, not rounded


def test_given_rows_are_clean_at_the_last_bucket_and_not_counted() -> None:
    task = task_of(torch.arange(3.0).view(3, 1), noise=9.0, time=0.0, delay=2)
    assert task.noisy.flatten().tolist() == [0.0, 1.0, 9.0]
    assert task.bucket.flatten().tolist() == [CLEAN_BUCKET, CLEAN_BUCKET, 0]
    assert task.counted.flatten().tolist() == [False, False, True]


def test_given_rows_have_no_gradient() -> None:
    task = task_of(torch.arange(4.0).view(4, 1), noise=9.0, time=0.3, delay=2)
    velocity = torch.zeros(1, 1, 4, 1, requires_grad=True)
    flow_error(velocity, task).sum().backward()
    assert velocity.grad is not None
    assert (velocity.grad.flatten() != 0).tolist() == [False, False, True, True]


def test_slots_that_nothing_moves_enter_as_zero_and_those_of_other_robots_as_noise() -> None:
    valid, moved = torch.tensor([[True, False, False]]), torch.tensor([True, True, False])
    task = task_of(torch.tensor([[1.0, 0.0, 0.0]]), noise=5.0, time=0.5, valid=valid, moved=moved)
    assert task.noisy.flatten().tolist() == [3.0, 2.5, 0.0]
    assert flow_error(torch.tensor([[[[-3.0, 100.0, 100.0]]]]), task).item() == 1.0  # target 1 - 5 = -4, off by 1


def test_errors_are_summed_over_what_counts_of_each_observation() -> None:
    valid = torch.tensor([[True], [True], [False]])
    task = task_of(torch.zeros(3, 1), noise=0.0, time=0.0, valid=valid)
    assert flow_error(torch.tensor([1.0, 3.0, 50.0]).view(1, 1, 3, 1), task).tolist() == [10.0]
    assert int(task.counted.sum()) == 2


def test_a_text_counts_the_tokens_that_are_asked() -> None:
    answer = torch.tensor([[1, 0, NOT_ASKED], [NOT_ASKED] * 3])
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1] = 100.0
    assert text_error(logits, answer).tolist() == pytest.approx([math.log(4), 0.0])


def test_times_follow_the_published_distribution() -> None:
    """t = (0.999 - Beta(1.5, 1)) / 0.999 below 0 at 1 in a thousand, which become 0."""
    times = FlowDistribution().times((200_000,), generator()).numpy()
    assert times.min() >= 0.0
    assert times.max() <= 1.0
    published = (0.999 - stats.beta(1.5, 1).rvs(200_000, random_state=1)) / 0.999
    assert stats.kstest(times, published.clip(0)).pvalue > 0.01
    exact = stats.kstest(times[times > 0], lambda t: 1 - stats.beta(1.5, 1).cdf(0.999 * (1 - t)) / 0.999**1.5)
    assert exact.pvalue > 0.01
    assert (times == 0).mean() == pytest.approx(1 - 0.999**1.5, abs=3e-4)


def test_delay_weights_are_the_published_two() -> None:
    weights = Delays(DelayConfig(True, 3)).probabilities("any").tolist()
    total = math.e**2 + math.e + 1
    assert weights == pytest.approx([math.e**2 / total, math.e / total, 1 / total])
    assert Delays(DelayConfig(True, 4, exponential=False)).probabilities("any").tolist() == [0.25] * 4


def test_every_robot_draws_its_own_delays() -> None:
    """Robot b: 10 ms of 20 are row 0 passed and row 1 to come, so 2; 70 ms are 5, the longest 4. Robot c has none."""
    delays = Delays(DelayConfig(True, 5, False, ROBOTS), first_share=0.2)
    names = ["a", "b", "c"] * 20_000
    drawn = delays.draw(names, 1, generator()).view(-1, 3)
    found = torch.stack([torch.bincount(column, minlength=5) / len(column) for column in drawn.T])
    expected = torch.tensor([[0.2, 0.6, 0.2, 0, 0], [0.2, 0, 0.2, 0, 0.6], [0.2] * 5])
    assert found == pytest.approx(expected.numpy(), abs=0.015)  # four standard errors
    assert bool((found[expected == 0] == 0).all())


@pytest.mark.parametrize("delays", [0, 1])
def test_without_delays_every_row_is_asked(delays: int) -> None:
    task = _drawn(delays=delays)
    assert bool(task.counted.all())
    assert int(task.bucket.max()) <= CLEAN_BUCKET


def test_delays_lock_leading_rows_and_never_all() -> None:
    task = _drawn(delays=4)
    locked = (~task.counted[..., 0]).sum(-1)
    assert set(locked.flatten().tolist()) == {0, 1, 2, 3}
    assert bool((task.counted[..., 0].long().diff(dim=-1) >= 0).all()), "a locked row came after a free one"
    assert bool((task.bucket[~task.counted[..., 0]] == CLEAN_BUCKET).all())


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


def _drawn(delays: int, seed: int = 0) -> FlowTask:
    actions = torch.ones(64, 5, 2)
    drawn = draw_flow(
        ["any"] * 64, (3, 5, 2), FlowDistribution(), Delays(DelayConfig(delays > 1, delays, False)), generator(seed)
    )
    return flow_task(actions, torch.ones_like(actions, dtype=torch.bool), torch.ones(2, dtype=torch.bool), drawn)
