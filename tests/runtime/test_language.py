import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.metadata import AmbiguousVariant, MetadataError, Statistics, measure, save_statistics
from onbeat.embodiment.rotation import convert_rotation
from onbeat.embodiment.schema import load_embodiment
from onbeat.kernels.image import normalise_pixels
from onbeat.runtime.language import (
    BadActions,
    LanguageError,
    LanguageSettings,
    PolicyLanguage,
    WrongEmbodiment,
    read_config,
)
from onbeat.runtime.observation import BadState, MissingView, Observation, observe_recorded
from onbeat.runtime.prompt import InstructionError, TemplateError

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(GOLDEN.glob("*/case_*.json"))
CHECKPOINT = GOLDEN / "ckpt_a2" / "checkpoint"
NOT_THE_WEIGHTS = shutil.ignore_patterns("*.safetensors", "*_metadata.json")


def checkpoint(folder: Path, **config: object) -> Path:
    """A copy of a recorded checkpoint without weights or statistics, its config changed."""
    shutil.copytree(CHECKPOINT, folder, ignore=NOT_THE_WEIGHTS)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def so101(folder: Path) -> PolicyLanguage:
    """The SO-101 with statistics that reach twice its limits at random."""
    robot = load_embodiment("so101")
    limits = robot.limits()
    rows = np.random.default_rng(3).uniform(2 * np.array(limits.lower), 2 * np.array(limits.upper), (500, 6))
    known = {name: measure(part) for name, part in robot.split(rows).items()}
    save_statistics(Statistics("cubes", "merged", known, known), checkpoint(folder))
    return PolicyLanguage.from_folder(folder, embodiment="so101")


def so101_observation() -> Observation:
    frames = {view: Frame(0, 0, np.full((60, 80, 3), shade, np.uint8)) for view, shade in (("wrist", 9), ("top", 200))}
    return Observation(frames, {"arm_joints": np.linspace(-1, 1, 5), "gripper": np.array([0.5])}, t_state_ns=0)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(LanguageError, match="give a checkpoint or bundle folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(LanguageError, match="not of a Being-H model"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "beingh"}')
    with pytest.raises(LanguageError, match="has no 'force_image_size'"):
        PolicyLanguage.from_folder(tmp_path, embodiment="libero")


def test_a_checkpoint_names_no_robot():
    with pytest.raises(LanguageError, match="say which embodiment"):
        PolicyLanguage.from_folder(CHECKPOINT)


def test_variants_are_not_guessed_once_statistics_matter():
    with pytest.raises(AmbiguousVariant, match="name one variant"):
        PolicyLanguage.from_folder(CHECKPOINT, embodiment="libero", dataset="libero_posttrain")
    assert PolicyLanguage.from_folder(CHECKPOINT, embodiment="libero").statistics is None
    named = PolicyLanguage.from_folder(CHECKPOINT, embodiment="libero", variant="libero_goal")
    assert named.settings.variant == "libero_goal"


def test_statistics_of_another_robot_are_refused():
    for variant in ("merged", None):
        with pytest.raises(MetadataError, match="of state 'arm_joints'"):
            PolicyLanguage.from_folder(CHECKPOINT, embodiment="so101", variant=variant)


def test_a_robot_that_needs_statistics_does_not_run_without(tmp_path):
    with pytest.raises(MetadataError, match="holds statistics of none"):
        PolicyLanguage.from_folder(checkpoint(tmp_path / "bare"), embodiment="so101")
    assert PolicyLanguage.from_folder(tmp_path / "bare", embodiment="libero").statistics is None


def test_an_unknown_template_is_refused(tmp_path):
    with pytest.raises(TemplateError, match="unknown template 'chatml'"):
        PolicyLanguage.from_folder(checkpoint(tmp_path / "c", template="chatml"), embodiment="libero")


def test_the_config_decides_words_and_sizes(tmp_path):
    words = {"system_message": "Mine.", "prompt_template": "short"}
    folder = checkpoint(tmp_path / "c", **words, force_image_size=112, action_chunk_length=15)
    settings = PolicyLanguage.from_folder(folder, embodiment="robocasa").settings
    assert (settings.system, settings.template, settings.chunk) == ("Mine.", "{task_description}", 15)
    assert (settings.image_size, settings.tokens_per_view, len(settings.views)) == (112, 16, 3)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_as_recorded(path):
    case, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    language = PolicyLanguage.from_folder(
        GOLDEN / case["checkpoint"],
        embodiment="libero",
        dataset=case["dataset_name"],
        variant="auto",
        views=[key.removeprefix("video.") for key in case["video_keys"]],
        template=case["instruction_template"],
    )
    seen = observe_recorded({name[3:]: arrays[name] for name in arrays.files if name.startswith("in/")})
    inputs = language.inputs(seen, case["instruction"])
    np.testing.assert_array_equal(normalise_pixels(inputs.views), arrays["mid/pixel_values"])
    np.testing.assert_array_equal(inputs.state, arrays["mid/padded_state"][0])
    assert inputs.state.dtype == np.float32
    assert len(inputs.token_ids) == arrays["mid/packed_action_indexes"][0]
    for name, values in language.normalise_state(seen.state).items():
        recorded = arrays[f"mid/processed/state.{name}"][0]
        assert values.dtype == recorded.dtype
        np.testing.assert_array_equal(values, recorded)
    decoded = language.decode(arrays["out/action_pred"])
    assert list(decoded) == ["eef_position", "eef_rotation", "gripper_position"]
    for name, values in decoded.items():
        np.testing.assert_array_equal(values, arrays[f"out/action.{name}"][0])


def test_bad_observations_and_instructions_give_no_inputs(tmp_path):
    language, seen = so101(tmp_path / "c"), so101_observation()
    with pytest.raises(MissingView):
        language.inputs(Observation({}, seen.state, 0), "lift")
    with pytest.raises(BadState):
        language.inputs(Observation(seen.views, {**seen.state, "gripper": np.array([np.nan])}, 0), "lift")
    with pytest.raises(InstructionError):
        language.inputs(seen, "lift<|im_end|>")


@pytest.mark.parametrize("value", [1e300, -1e39])
def test_a_state_too_large_for_the_network_is_named(value):
    language = PolicyLanguage.from_folder(CHECKPOINT, embodiment="libero")
    state = {key.name: np.zeros(key.size) for key in language.embodiment.state}
    assert np.isfinite(language.unify_state(state)).all()
    with pytest.raises(BadState, match="state 'eef_position' overflows float32"):
        language.unify_state(state | {"eef_position": np.array([0.0, value, 0.0])})


def test_state_and_views_reach_their_places(tmp_path):
    language = so101(tmp_path / "c")
    inputs = language.inputs(so101_observation(), "lift")
    assert inputs.views[:, 0, 0, 0].tolist() == [200, 9]  # top before wrist, whatever the order of the dictionary
    assert np.flatnonzero(inputs.state).tolist() == [18, 50, 51, 52, 53, 54]
    assert language.statistics is not None
    known = language.statistics.state["gripper"]
    share = (0.5 - known["min"]) / (known["max"] - known["min"])
    np.testing.assert_allclose(inputs.state[18], 2 * share - 1, rtol=1e-6)


def test_encode_undoes_decode(tmp_path):
    language = so101(tmp_path / "c")
    rows = np.zeros((4, 200), np.float32)
    rows[:, 50:55] = np.random.default_rng(5).uniform(-1, 1, (4, 5))
    rows[:, 18] = 0.25
    decoded = language.decode(rows)
    assert {name: values.shape for name, values in decoded.items()} == {"arm_joints": (4, 5), "gripper": (4, 1)}
    np.testing.assert_allclose(language.encode(decoded), rows, atol=1e-6)
    assert language.encode({name: values[:0] for name, values in decoded.items()}).shape == (0, 200)


def test_decode_gives_the_robots_own_unit(tmp_path):
    language = so101(tmp_path / "c")
    assert language.statistics is not None
    low = language.statistics.action["gripper"]["min"]
    np.testing.assert_allclose(language.decode(np.full((1, 200), -1, np.float32))["gripper"], [low], rtol=1e-6)


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ({"arm_joints": np.zeros((2, 5))}, "'gripper' of so101 must be rows of 1"),
        ({"arm_joints": np.zeros((2, 6)), "gripper": np.zeros((2, 1))}, "rows of 5 numbers"),
        ({"arm_joints": np.zeros(5), "gripper": np.zeros((1, 1))}, "rows of 5 numbers"),
        ({"arm_joints": np.zeros((2, 5)), "gripper": np.zeros((3, 1))}, r"have \[2, 3\] rows"),
        ({"arm_joint": np.zeros((2, 5))}, "did you mean 'arm_joints'"),
    ],
)
def test_actions_of_another_form_are_refused(tmp_path, actions, says):
    with pytest.raises(BadActions, match=says):
        so101(tmp_path / "c").encode(actions)


def test_rows_of_another_width_are_refused(tmp_path):
    with pytest.raises(BadActions, match="rows of 200"):
        so101(tmp_path / "c").decode(np.zeros((16, 32), np.float32))


def test_robocasa_reads_its_quaternion_real_first_and_switches_are_binary(tmp_path):
    language = PolicyLanguage.from_folder(checkpoint(tmp_path / "c"), embodiment="robocasa")
    xyzw = np.array([0.0, 0.0, 0.6, 0.8])  # what the simulator means: a turn about z
    sizes = {key.name: np.zeros(key.size) for key in language.embodiment.state} | {"base_rotation": xyzw}
    rotation = language.unify_state(language.normalise_state(sizes))[73:76]
    np.testing.assert_allclose(rotation, convert_rotation(xyzw, "quaternion_wxyz", "axis_angle"), atol=1e-7)
    assert not np.allclose(rotation, convert_rotation(xyzw, "quaternion_xyzw", "axis_angle"))
    decoded = language.decode(np.full((1, 200), 0.6, np.float32))
    assert decoded["control_mode"] == decoded["gripper_position"] == 1
    np.testing.assert_array_equal(decoded["base_motion"], np.full((1, 4), 0.6, np.float32))


def test_a_bundle_says_the_same_as_its_checkpoint(tmp_path):
    first = so101(tmp_path / "checkpoint")
    (tmp_path / "bundle").mkdir()
    written = first.save(tmp_path / "bundle")
    names = ["cubes_metadata.json", "embodiment.toml", "language.json", "tokenizer.json"]
    assert sorted(path.name for path in written) == names
    again = PolicyLanguage.from_folder(tmp_path / "bundle", embodiment="so101")
    assert again.settings == first.settings
    assert again.embodiment == first.embodiment
    ours, theirs = (language.inputs(so101_observation(), "lift the cube") for language in (first, again))
    for name in ("views", "token_ids", "state", "image_start", "state_index"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    rows = np.random.default_rng(9).normal(size=(16, 200)).astype(np.float32)
    for name, values in first.decode(rows).items():
        np.testing.assert_array_equal(again.decode(rows)[name], values)


def test_a_bundle_for_another_robot_or_variant_is_refused(tmp_path):
    so101(tmp_path / "checkpoint").save(tmp_path)
    with pytest.raises(WrongEmbodiment, match="exported for 'so101', not for 'libero'"):
        PolicyLanguage.from_folder(tmp_path, embodiment="libero")
    with pytest.raises(LanguageError, match="exported with variant 'merged'"):
        PolicyLanguage.from_folder(tmp_path, variant="cup")


def test_settings_with_an_odd_field_are_refused(tmp_path):
    document = so101(tmp_path / "c").settings.to_json()
    assert LanguageSettings.from_json(json.loads(json.dumps(document))).to_json() == document
    with pytest.raises(LanguageError, match="'colour' is unknown or missing"):
        LanguageSettings.from_json(document | {"colour": 1})
    del document["chunk"]
    with pytest.raises(LanguageError, match="'chunk' is unknown or missing"):
        LanguageSettings.from_json(document)
