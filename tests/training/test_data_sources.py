"""Datasets as samples of the network: any robot's columns, rates and kinds; events; hands; questions; and the recipe's
[data] that puts them together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from onbeat.embodiment.kinds import to_absolute
from onbeat.embodiment.metadata import MERGED, Statistics
from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.schema import load_embodiment
from onbeat.kernels.image import resize_and_crop
from onbeat.runtime.language import LanguageSettings, PolicyLanguage
from onbeat.runtime.prompt import load_tokenizer
from onbeat.training.data.catalogue import DataSettings, SourceSettings, open_catalogue, split
from onbeat.training.data.columns import Columns, read_columns
from onbeat.training.data.layout import DataError, Feature
from onbeat.training.data.mixture import Mixture, plan_mixture
from onbeat.training.data.reader import open_dataset
from onbeat.training.data.robot_data import RobotData
from onbeat.training.data.sources import QuestionSource, RobotSource
from onbeat.training.data.statistics import measure_data
from onbeat.training.data.writer import DatasetWriter

SO101, LIBERO, HAND = (load_embodiment(name) for name in ("so101", "libero", "human_hand"))
SIDE, CHUNK, HEIGHT, WIDTH = 8, 4, 12, 16
GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer(golden: Path):
    return load_tokenizer(golden / "ckpt_a1" / "checkpoint")


def camera(height: int = HEIGHT, width: int = WIDTH) -> Feature:
    return Feature("video", (height, width, 3), ["height", "width", "channels"])


def widths(robot: Embodiment) -> tuple[int, int]:
    return sum(key.size for key in robot.state), sum(key.size for key in robot.action)


def record(
    folder: Path, robot: Embodiment, lengths: Sequence[int], fps: float, extra: Mapping[str, Feature] | None = None
) -> Path:
    """Random episodes of a robot in its default columns. extra: more columns, filled with random numbers."""
    rng = np.random.default_rng(len(robot.name))
    state, action = widths(robot)
    numbers = {"observation.state": Feature("float32", (state,)), "action": Feature("float32", (action,))}
    cameras = {f"observation.images.{view}": camera() for view in robot.views}
    with DatasetWriter(folder, fps=fps, features={**numbers, **(extra or {}), **cameras}) as writer:
        for number, length in enumerate(lengths):
            columns = {n: fill(rng, f, length) for n, f in {**numbers, **(extra or {})}.items()}
            columns |= {n: rng.integers(0, 256, (length, HEIGHT, WIDTH, 3), dtype=np.uint8) for n in cameras}
            writer.add_episode(columns, f"task {number % 2}")
    return folder


def fill(rng: np.random.Generator, feature: Feature, length: int) -> NDArray[Any]:
    if feature.dtype == "bool":
        return (np.arange(length) == length - 3)[:, None]
    return rng.uniform(-0.5, 0.5, (length, *feature.shape)).astype(feature.dtype)


def open_data(folder: Path, robot: Embodiment, document: Mapping[str, Any] | None = None) -> RobotData:
    dataset = open_dataset(folder)
    return RobotData(dataset, robot, read_columns(document or {}, robot, robot.views, dataset.info.features, "here"))


def speak(tokenizer: Any, robot: Embodiment, statistics: Statistics | None) -> PolicyLanguage:
    settings = LanguageSettings(robot.name, robot.views, SIDE, 1, CHUNK, "You move.", "{task_description}")
    return PolicyLanguage(settings, robot, tokenizer, statistics)


def source(tokenizer: Any, data: RobotData, **options: Any) -> RobotSource:
    language = speak(tokenizer, data.robot, measure_data("all", [data], CHUNK).merged)
    return RobotSource(data, language, kind=options.pop("kind", "robot"), **options)


def test_a_sample_is_what_the_runtime_would_see(tmp_path: Path, tokenizer: Any) -> None:
    data = open_data(record(tmp_path / "arm", SO101, [6, 9], 10), SO101)
    samples = source(tokenizer, data)
    language, found = samples.language, samples.sample(6 + 2, GENERATOR)  # frame 2 of episode 1
    for view, name in enumerate(SO101.views):
        rgb = data.dataset.image(1, 2, f"observation.images.{name}")
        assert np.array_equal(found.frames[view], np.moveaxis(resize_and_crop(rgb, SIDE), -1, 0))
    state = data.dataset.numbers(1, "observation.state")[2]
    parts = {"arm_joints": state[:5], "gripper": state[5:]}
    assert np.array_equal(found.state, language.unify_state(language.normalise_state(parts)))
    actions = data.dataset.numbers(1, "action")[2:6]
    assert np.array_equal(found.actions, language.encode({"arm_joints": actions[:, :5], "gripper": actions[:, 5:]}))
    assert found.valid.sum(axis=1).tolist() == [6] * 4
    assert np.array_equal(found.prompt.token_ids, language.prompt("task 1").token_ids)
    assert (found.task, found.embodiment, found.kind, len(samples)) == ("task 1", "so101", "robot", 15)


def test_rows_beyond_the_episode_repeat_its_last_and_do_not_count(tmp_path: Path, tokenizer: Any) -> None:
    data = open_data(record(tmp_path / "arm", SO101, [6, 9], 10), SO101)
    found = source(tokenizer, data).sample(4, GENERATOR)  # the last but one of episode 0
    assert found.valid.any(axis=1).tolist() == [True, True, False, False]
    assert np.array_equal(found.actions[1], found.actions[3])
    held = source(tokenizer, data, holds_at_end=True).sample(4, GENERATOR)
    assert held.valid.any(axis=1).all()


def test_some_episodes_and_frames_in_memory_are_the_same_samples(tmp_path: Path, tokenizer: Any) -> None:
    data = open_data(record(tmp_path / "arm", SO101, [6, 9, 5], 10), SO101)
    whole, some = source(tokenizer, data), source(tokenizer, data, episodes=[1, 2], in_memory=True)
    assert len(some) == 14
    for index in range(14):
        assert np.array_equal(some.sample(index, GENERATOR).frames, whole.sample(6 + index, GENERATOR).frames)
        assert np.array_equal(some.sample(index, GENERATOR).actions, whole.sample(6 + index, GENERATOR).actions)


def test_a_faster_recording_is_read_at_the_robots_period(tmp_path: Path, tokenizer: Any) -> None:
    data = open_data(record(tmp_path / "arm", SO101, [12], 30), SO101)
    samples = source(tokenizer, data)
    actions = data.dataset.numbers(0, "action")[[1, 4, 7, 10]]
    decoded = samples.language.decode(samples.sample(1, GENERATOR).actions)
    assert SO101.flatten(decoded) == pytest.approx(actions, abs=1e-6)
    assert samples.sample(4, GENERATOR).valid.any(axis=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("fps", [4, 15])
def test_a_rate_that_does_not_fit_the_period_is_refused(fps: float, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"arm has {fps} rows/s and so101 one in 100 ms"):
        open_data(record(tmp_path / "arm", SO101, [6], fps), SO101)


def test_steps_cannot_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'eef_position' is a step per row"):
        open_data(record(tmp_path / "arm", LIBERO, [6], 40), LIBERO)


TARGETS = {
    "state": {
        "eef_position": "observation.state[0:3]",
        "eef_rotation": "observation.state[3:6]",
        "libero_gripper_position": "observation.state[6:8]",
    },
    "action": {
        "eef_position": {"column": "action[0:3]", "kind": "absolute"},
        "eef_rotation": {"column": "action[3:6]", "kind": "absolute"},
        "gripper_position": "action[6:7]",
    },
}


def test_targets_become_the_steps_that_a_robot_is_taught(tmp_path: Path) -> None:
    """Recorded as targets at twice the rate; learnt as steps; integrated, they are the targets again."""
    data = open_data(record(tmp_path / "arm", LIBERO, [12], 40), LIBERO, TARGETS)
    targets, state = (data.dataset.numbers(0, name).astype(np.float64) for name in ("action", "observation.state"))
    for frame in (0, 1, 3):
        chunk = data.chunk(0, frame, 4)
        before = targets[frame - 2] if frame >= 2 else np.r_[state[frame, :6], 0]
        back = to_absolute(LIBERO, LIBERO.flatten(chunk.actions), committed=before, observed=np.zeros(7))
        assert back == pytest.approx(targets[frame + 2 * np.arange(4)], abs=1e-5), frame


def test_hands_are_a_robot_like_any_other(tmp_path: Path, tokenizer: Any) -> None:
    """MANO: wrists, shape and articulation in their slots."""
    data = open_data(record(tmp_path / "hands", HAND, [7], 10), HAND)
    found = source(tokenizer, data, kind="human").sample(3, GENERATOR)
    shape, theta = slice(90, 110), slice(110, 200)
    row = data.dataset.numbers(0, "observation.state")[3]
    assert np.array_equal(found.state[shape], np.r_[row[6:16], row[67:77]])
    assert np.array_equal(found.state[theta], np.r_[row[16:61], row[77:122]])
    assert found.valid[0, theta].all()
    assert not found.valid[0, shape].any()
    assert (found.kind, found.embodiment) == ("human", "human_hand")


CONTACT = {"event.contact": Feature("bool", (1,)), "cube": Feature("float32", (3,)), "d": Feature("image", (2, 3, 1))}


def test_events_survive_into_samples_and_weights(tmp_path: Path, tokenizer: Any) -> None:
    """Contact at frame 6 of 9, chunks of 4 rows: frames 3 to 6 hold it."""
    folder = record(tmp_path / "arm", SO101, [9, 9], 10, {k: v for k, v in CONTACT.items() if k != "d"})
    data = open_data(folder, SO101, {"extra": {"place": "cube"}})
    samples = source(tokenizer, data, boosts={"contact": 3.0})
    assert samples.weights.tolist() == ([1] * 3 + [3] * 4 + [1] * 2) * 2
    assert [samples.sample(i, GENERATOR).marks["contact"] for i in (2, 3, 6, 7)] == [0, 0.25, 0.25, 0]
    assert np.array_equal(samples.sample(2, GENERATOR).extra["place"], data.dataset.numbers(0, "cube")[2])
    with pytest.raises(DataError, match="no column of the event 'release'"):
        source(tokenizer, data, boosts={"release": 2.0})
    with pytest.raises(DataError, match="1 or more"):
        source(tokenizer, data, boosts={"contact": 0.5})


def test_units_are_converted_by_the_table(tmp_path: Path) -> None:
    degrees = {"column": "action[0:5]", "scale": 0.5, "offset": 1.0}
    document = {"action": {"arm_joints": degrees, "gripper": "action[5:6]"}}
    data = open_data(record(tmp_path / "arm", SO101, [6], 10), SO101, document)
    assert data.actions(0, 0, 6)["arm_joints"] == pytest.approx(0.5 * data.dataset.numbers(0, "action")[:, :5] + 1)


BOTH = {"views": {"top": "observation.images.top", "wrist": "observation.images.top"}}
FEATURES = {
    "observation.state": Feature("float32", (6,)),
    "action": Feature("float32", (7,)),
    "observation.images.top": camera(),
    "observation.images.wrist": Feature("image", (4, 4, 1)),
}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"view": {}}, "did you mean 'views'"),
        ({"views": {"top": "observation.images.top"}}, "'wrist' is missing"),
        ({"views": {"top": "observation.images.top", "wrist": "observation.images.wrist"}}, "no colour camera"),
        ({"views": {"top": "observation.images.top", "wrist": "images.top"}}, "no column 'images.top'"),
        ({}, "no colour camera"),
        ({**BOTH, "action": {"arm_joints": "action[0:5]", "gripper": "action[4:6]"}}, "takes 1 numbers"),
        ({**BOTH, "action": {"arm_joints": "action[0:5]", "gripper": "action[7:8]"}}, "gives 7 to 8 of 7"),
        ({"action": {"arm_joints": "action[0:5]", "grip": "action[5:6]"}}, "did you mean 'gripper'"),
        ({"action": {"arm_joints": {"column": "action[0:5]", "kind": "step"}, "gripper": "action[5:6]"}}, "no kind"),
        ({"marks": {"touch": "event.touch"}}, "unknown name 'touch'"),
        ({**BOTH, "extra": {"place": "cube"}}, "no column 'cube'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(document: Mapping[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        read_columns(document, SO101, SO101.views, FEATURES, "here")


def test_a_column_of_another_width_is_another_robots() -> None:
    features = {**FEATURES, "observation.images.wrist": camera()}
    with pytest.raises(DataError, match="the action of so101 takes 6 numbers, and 'action' has 7"):
        read_columns({}, SO101, SO101.views, features, "here")


def test_default_columns_are_the_embodiments_order() -> None:
    features = {**FEATURES, "observation.images.wrist": camera(), "action": Feature("float32", (6,))}
    columns: Columns = read_columns({}, SO101, SO101.views, features, "here")
    assert (columns.action["gripper"].start, columns.action["gripper"].stop) == (5, 6)
    assert columns.views["wrist"] == "observation.images.wrist"


def write_questions(folder: Path, rows: Sequence[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 7, np.uint8)).save(folder / "a.png")
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_questions_are_answered_in_words_and_move_nothing(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"images": ["a.png", "a.png"], "question": "what?", "answer": "a cube"}, {"question": "?", "answer": "no"}]
    questions = QuestionSource(write_questions(tmp_path / "vl", rows), speak(tokenizer, SO101, None))
    found = questions.sample(0, GENERATOR)
    assert found.frames.shape == (2, 3, SIDE, SIDE)
    assert bool((found.frames == 7).all())
    assert not found.valid.any()
    assert not found.state.any()
    assert found.text is not None
    assert tokenizer.decode(found.text.tolist(), skip_special_tokens=False) == "a cube<|im_end|>"
    assert questions.sample(1, GENERATOR).frames.shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("row", [{"question": "?"}, {"question": "?", "answer": 3}, []])
def test_a_question_that_is_none_is_named_by_its_row(row: Any, tmp_path: Path, tokenizer: Any) -> None:
    path = write_questions(tmp_path / "vl", [{"question": "?", "answer": "no"}, row])
    with pytest.raises(DataError, match=r"pictures.jsonl row 1: give a 'question'"):
        QuestionSource(path, speak(tokenizer, SO101, None))


def test_a_missing_picture_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write_questions(tmp_path / "vl", [{"images": ["b.png"], "question": "?", "answer": "no"}])
    with pytest.raises(DataError, match=r"row 0: b.png cannot be read"):
        QuestionSource(path, speak(tokenizer, SO101, None)).sample(0, GENERATOR)


def test_a_recipes_data_become_one_mixture(tmp_path: Path, tokenizer: Any) -> None:
    """A robot, a simulated one, hands, and questions: opened, measured, split, planned, drawn, read."""
    record(tmp_path / "arm", SO101, [6, 9, 8], 10)
    record(tmp_path / "twin", SO101, [7, 7, 9], 20)
    record(tmp_path / "hands", HAND, [20, 11], 10)
    pictures = write_questions(tmp_path / "vl", [{"question": "?", "answer": "no"}] * 5)
    kinds = {"arm": ("robot", "so101"), "twin": ("simulation", "so101"), "hands": ("human", "human_hand")}
    sources = {n: SourceSettings(str(tmp_path / n), kind, robot) for n, (kind, robot) in kinds.items()}
    sources["pictures"] = SourceSettings(str(pictures), "vision_language")
    settings = DataSettings(sources, keep={"human_hand": 0.5}, simulation_cap=0.3)
    catalogue = open_catalogue(settings, held_out=0.3, seed=1)
    assert set(catalogue.texts()) == {"task 0", "task 1", "?", "no"}
    measured = catalogue.measure("all", CHUNK)
    assert measured.merged.variant == MERGED
    languages = {n: speak(tokenizer, r, measured.variants[n]) for n, r in catalogue.robots.items()}
    fitted, held_out = catalogue.sources(languages), catalogue.held_out(languages)
    assert [len(s) + len(h) for s, h in zip(fitted, held_out, strict=True)] == [23, 23, 31, 5]
    assert [len(held_out[-1]), held_out[-1].kind] == [2, "vision_language"]
    plan = plan_mixture(fitted, settings.proportions, batch=5)
    assert plan.simulation <= 0.3
    mixture = Mixture(fitted, plan, batch=5, seed=1)
    for step in range(mixture.steps_per_epoch):
        for draw in mixture.draws(step):
            found = fitted[draw.source].sample(draw.sample, GENERATOR)
            assert found.kind == fitted[draw.source].kind
            assert np.isfinite(found.actions).all()


def test_a_part_is_held_out_unless_there_is_only_one() -> None:
    fitted, held_out = split(10, 0.2, seed=5)
    assert len(held_out) == 2
    assert sorted(fitted + held_out) == list(range(10))
    assert split(10, 0.2, seed=5)[1] == held_out
    assert split(1, 0.2, seed=5) == ((0,), ())
    assert split(4, 0.0, seed=5) == ((0, 1, 2, 3), ())


def test_what_is_missing_of_a_dataset_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    folder = record(tmp_path / "arm", SO101, [6, 9], 10)
    video = next(folder.glob("videos/*wrist/*/*.mp4"))
    video.unlink()
    settings = DataSettings({"arm": SourceSettings(str(folder), "robot", "so101")})
    with pytest.raises(DataError, match=rf"{video} is missing \(observation.images.wrist of episode 0\)"):
        open_catalogue(settings, held_out=0.5, seed=0)


def test_a_source_without_a_robot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no embodiment"):
        open_catalogue(DataSettings({"arm": SourceSettings(str(tmp_path), "robot")}), held_out=0.1, seed=0)
    with pytest.raises(DataError, match="no source of a robot"):
        open_catalogue(DataSettings({"vl": SourceSettings("x.jsonl", "vision_language")}), held_out=0.1, seed=0)
