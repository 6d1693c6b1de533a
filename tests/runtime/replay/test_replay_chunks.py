"""The recorded flight from its observations: what the network, the chunker and the scheduler say again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onbeat.runtime.flight.backend import backend, backend_changes
from onbeat.runtime.policy import Policy
from onbeat.runtime.replay import playback
from onbeat.runtime.replay.chunks import ChunkReplay, beside
from onbeat.runtime.replay.layers import Layer, replay_recorded_observations, replay_whole
from onbeat.runtime.replay.recording import Frames, NotReplayable, Recording
from onbeat.runtime.replay.ticks import new_state

# Another processor may round otherwise; there the answer is held to its noise floor.
SHORT = 8  # chunks, where so many say as much as all


def short(recording: Recording, count: int = SHORT) -> Recording:
    ticks = recording.ticks[: np.argmax(recording.ticks["in_sight"] > count)]
    return replace(recording, chunks=recording.chunks[:count], observations=recording.observations[:count], ticks=ticks)


def with_chunk(recording: Recording, k: int | slice, **changed: Any) -> Recording:
    altered = recording.chunks.copy()
    for name, value in changed.items():
        altered[name][k] = value
    return replace(recording, chunks=altered)


def assert_the_same(recording: Recording, layer: Layer) -> None:
    if backend_changes(recording.log.header["backend"], backend(threads=1)):
        assert layer.is_within_noise, layer.fields
    else:
        assert layer.first is None


def first_of(recording: Recording, policy: Policy) -> tuple[str, int]:
    layer, _ = replay_recorded_observations(recording, policy)
    assert layer.first is not None
    return layer.first.field.partition("[")[0], layer.first.number


def test_the_first_chunks_come_again(recording: Recording, policy: Policy):
    layer, floors = replay_recorded_observations(short(recording), policy)
    assert_the_same(recording, layer)
    assert layer.compared == {"/chunk": SHORT}
    assert 1e-8 < floors["targets_rad"] < 1e-5  # a few units in the last place of a float32 of order 1


@pytest.mark.slow
def test_the_whole_flight_comes_again(recording: Recording, policy: Policy):
    layer, floors = replay_recorded_observations(recording, policy)
    whole = replay_whole(recording, policy, floors)
    for replayed in (layer, whole):
        assert_the_same(recording, replayed)
    assert whole.compared == {"/chunk": len(recording.chunks), "/tick": len(recording.ticks)}


def test_another_seed_is_seen_at_the_first_chunk(native: Recording, policy: Policy):
    noise = np.random.default_rng(1).standard_normal(native.chunks["noise"].shape, np.float32)
    assert first_of(with_chunk(short(native, 3), slice(None), noise=noise[:3]), policy) == ("actions", 0)


def test_one_pixel_is_seen(native: Recording, policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """In the frame that inference 2 began from."""
    t_ns, original = int(native.observations["captured_ns"][2, 0]), Frames.at

    def at(self: Frames, t_capture_ns: int) -> np.ndarray | None:
        rgb = original(self, t_capture_ns)
        if rgb is not None and t_capture_ns == t_ns and self.name == "top":
            rgb = rgb.copy()
            rgb[50, 60, 1] ^= 64
        return rgb

    monkeypatch.setattr(Frames, "at", at)
    assert first_of(short(native, 4), policy) == ("actions", 2)


def test_a_joint_that_moved_is_seen_and_so_is_another_instruction(native: Recording, policy: Policy):
    for name, value in (("position_rad", native.observations["position_rad"][2] + 0.01), ("instruction", "wait")):
        observations = native.observations.copy()
        observations[name][2] = value
        assert first_of(short(replace(native, observations=observations), 4), policy) == ("actions", 2)


def test_a_chunk_that_came_later_has_another_delay(native: Recording, policy: Policy):
    later = native.chunks["met_ns"][2] + 2 * native.robot.policy_period_ns
    assert first_of(with_chunk(short(native, 4), 2, met_ns=later), policy)[1] == 2


def test_what_is_published_then_is_judged_by_itself(native: Recording, policy: Policy):
    """A wrong answer at one chunk is one wrong answer: the next continue what was recorded, not what is replayed."""
    noise = native.chunks["noise"][1] + np.float32(0.5)
    layer, _ = replay_recorded_observations(with_chunk(short(native, 5), 1, noise=noise), policy)
    assert [(report.field, report.differing) for report in layer.fields] == [("actions", 1)]


def test_an_inference_that_is_not_due_is_a_difference(native: Recording, policy: Policy):
    """As if the scheduler waited longer between two observations."""
    robot = replace(native.robot, config=replace(native.robot.config, execute_steps=8))
    field, number = first_of(replace(short(native, 3), robot=robot), policy)
    assert (field, number) == ("started_ns", 1)


def test_a_frame_that_the_log_lacks_is_named(native: Recording, policy: Policy):
    observations = native.observations.copy()
    observations["captured_ns"][1] += 1
    replay_of = ChunkReplay(
        replace(native, observations=observations),
        policy,
        new_state(native.robot, native.rows).timeline,
        follows_record=True,
    )
    replay_of.play(0)
    with pytest.raises(NotReplayable, match="no frame of 'top'"):
        replay_of.play(1)


def test_rounding_alone_is_within_noise_and_more_is_not(native: Recording, policy: Policy):
    """Noise moved by a unit in the last place, as another build might round; then by a thousand times that."""
    part, generator = short(native, 5), np.random.default_rng(3)
    moved = np.stack([beside(noise, generator) for noise in part.chunks["noise"]])
    _, floors = replay_recorded_observations(part, policy)
    rounded = replay_whole(with_chunk(part, slice(None), noise=moved), policy, floors)
    assert not rounded.is_exact
    assert rounded.is_within_noise
    far = replay_whole(with_chunk(part, slice(None), noise=part.chunks["noise"] + np.float32(1e-3)), policy, floors)
    assert not far.is_within_noise


def test_numbers_beside_are_the_next_there_are():
    values = np.array([1.0, -1.0, 0.5], np.float32)
    moved = beside(values, np.random.default_rng(0))
    assert (moved != values).all()
    assert (np.abs(moved - values) <= np.spacing(np.abs(values))).all()


def test_directions_of_the_record_go_to_the_gate(policy: Policy):
    """A policy that takes none is given none; one that does gets those of its record."""
    dtype = np.dtype([("inferred_ns", np.int64), ("noise", np.float32, (1, 2)), ("directions", np.float32, (3,))])
    recorded, asked = np.zeros(1, dtype)[0], []
    recorded["inferred_ns"], recorded["directions"] = 9, [1, 2, 3]

    class Asked:
        language, spec = policy.language, policy.spec

        def infer(self, *_: object, **how: object) -> object:
            asked.append(how)
            return object()

    clock = playback.RecordedClock()
    answering = playback.RecordedPolicy(Asked(), clock, follows_record=False)  # pyright: ignore[reportArgumentType]
    answering.show(recorded)
    answering.infer(None, "x")  # pyright: ignore[reportArgumentType]
    assert asked[0]["directions"].tolist() == [1, 2, 3]
    assert clock() == 9
