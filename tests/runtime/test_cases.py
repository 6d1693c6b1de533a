"""Recorded cases are read whole, or refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.cases import CaseError, Replay, case_language, load_cases, replay_case
from onbeat.runtime.engine import FlowResult, PolicyInputs, SamplerSpec


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """A copy of the cases that a test may damage."""
    return Path(shutil.copytree(golden, tmp_path / "cases", ignore=shutil.ignore_patterns("checkpoint", "unit_*")))


def describe(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


class Echo:
    """Answers a case with its own recorded actions, and remembers what it was asked."""

    def __init__(self, actions: np.ndarray) -> None:
        self.actions, self.asked = actions, {}
        self.spec = type("Spec", (), {"chunk": len(actions)})

    def prefix(self, inputs: PolicyInputs) -> PolicyInputs:
        return inputs

    def flow(self, _: PolicyInputs, noise: np.ndarray, **asked: object) -> FlowResult:
        self.asked = {"noise": noise, **asked}
        return FlowResult(self.actions, np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32))


def test_all_cases_are_read(golden: Path) -> None:
    cases = load_cases(golden)
    assert [case.name for case in cases] == [
        "ckpt_a1/case_01_plain",
        "ckpt_a2/case_02_mpg1",
        "ckpt_a2/case_03_mpg2",
        "ckpt_a1/case_04_rtc3",
    ]
    assert {case.embodiment.name for case in cases} == {"libero"}
    assert all(set(case.keys) == {"eef_position", "eef_rotation", "gripper_position"} for case in cases)
    assert all(case.keys["eef_position"].shape == (16, 3) for case in cases)


def test_sampler_is_what_was_in_effect(golden: Path) -> None:
    plain, one, two, locked = load_cases(golden)
    assert plain.sampler == locked.sampler == SamplerSpec(4, 1, "off", 0.0, 1.0, 0)
    assert one.sampler == SamplerSpec(4, 2, "directions", 0.1, 2.0, 16)
    assert two.sampler == replace(one.sampler, iterations=3)
    assert two.overrides == {"mpg_refinement_iters": 2}
    assert (two.noise.shape, two.directions.shape) == ((3, 16, 200), (2, 4, 16, 64))
    assert plain.directions is None


def test_only_an_active_prefix_is_kept(golden: Path) -> None:
    cases = load_cases(golden)
    assert [(case.keeps_prefix, case.delay) for case in cases] == [(False, 0)] * 3 + [(True, 3)]
    for case, kept in ((cases[3], 3), (replace(cases[3], keeps_prefix=False), 0)):
        echo = Echo(case.actions)
        replay_case(case, echo, case_language(golden / case.checkpoint, case))
        assert echo.asked["delay"] == kept
        assert (echo.asked["prev_chunk"] is None) == (kept == 0)


def test_a_wrong_slot_shows_in_the_keys_too(golden: Path) -> None:
    case = load_cases(golden)[0]
    language = case_language(golden / case.checkpoint, case)
    assert replay_case(case, Echo(case.actions), language).worst < 1e-6
    shifted = replay_case(case, Echo(np.roll(case.actions, 1, axis=1)), language)
    assert shifted.actions > 0.1
    assert min(shifted.keys.values()) > 0.1


def test_nan_is_never_within() -> None:
    assert not Replay(0.0, {"a": float("nan"), "b": 0.0}).worst <= 1e9
    assert not Replay(float("nan"), {}).worst <= 1e9


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="give a folder of recorded cases"):
        load_cases(tmp_path)


@pytest.mark.parametrize(
    "manifest", ["{", "{}", "[]", "null", "[1]", '[{"file": "x.npz"}]', '[{"file": 1, "checkpoint": "c"}]']
)
def test_bad_manifest(copied: Path, manifest: str) -> None:
    (copied / "manifest.json").write_text(manifest)
    with pytest.raises(CaseError, match="manifest"):
        load_cases(copied)


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_truncated_arrays(copied: Path, cut: int) -> None:
    path = copied / "ckpt_a1/case_01_plain.npz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CaseError, match="case_01_plain"):
        load_cases(copied)


@pytest.mark.parametrize("field", ["instruction", "rtc_active", "video_keys", "num_inference_timesteps"])
def test_missing_description(copied: Path, field: str) -> None:
    path = copied / "ckpt_a1/case_01_plain.json"
    description = json.loads(path.read_text())
    del description[field]
    path.write_text(json.dumps(description))
    with pytest.raises(CaseError, match=field):
        load_cases(copied)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_timesteps", "four"),
        ("mpg_lambda", None),
        ("mpg_refinement_iters", "1"),
        ("mpg_gate_temperature", float("nan")),
        ("inference_delay", "x"),
    ],
)
def test_a_setting_that_is_no_number_is_named(copied: Path, field: str, value: object) -> None:
    describe(copied / "ckpt_a2/case_02_mpg1.json", **{field: value})
    with pytest.raises(CaseError, match=f"ckpt_a2/case_02_mpg1: '{field}' is .*record the case again"):
        load_cases(copied)


def test_an_override_that_is_no_number_is_named(copied: Path) -> None:
    describe(copied / "ckpt_a2/case_02_mpg1.json", overrides={"mpg_lambda": "x"})
    with pytest.raises(CaseError, match=r"ckpt_a2/case_02_mpg1: 'mpg_lambda' is 'x'"):
        load_cases(copied)


def test_a_broken_description_is_not_said_to_be_absent(copied: Path) -> None:
    path = copied / "ckpt_a1/case_01_plain.json"
    path.write_text("{")
    with pytest.raises(CaseError, match=r"case_01_plain\.json is no readable JSON"):
        load_cases(copied)
    path.unlink()
    with pytest.raises(CaseError, match=r"there is no .*case_01_plain\.json: every case needs one"):
        load_cases(copied)


@pytest.mark.parametrize("rows", [0, 1, 15])
@pytest.mark.parametrize("name", ["out/action_pred", "out/action.eef_position"])
def test_an_answer_of_other_rows_is_refused(copied: Path, name: str, rows: int) -> None:
    path = copied / "ckpt_a1/case_01_plain.npz"
    arrays = dict(np.load(path))
    cut = arrays[name][:rows] if name == "out/action_pred" else arrays[name][:, :rows]
    np.savez(path, **{**arrays, name: cut})
    with pytest.raises(CaseError, match=f"ckpt_a1/case_01_plain: '{name}' is .* not 16 rows"):
        load_cases(copied)


def test_an_action_the_robot_lacks_is_refused(copied: Path) -> None:
    path = copied / "ckpt_a1/case_01_plain.npz"
    np.savez(path, **dict(np.load(path)), **{"out/action.bogus": np.zeros((1, 16, 1), np.float32)})
    with pytest.raises(CaseError, match=r"ckpt_a1/case_01_plain: 'out/action\.bogus' is no action of libero"):
        load_cases(copied)


def test_missing_noise(copied: Path) -> None:
    path = copied / "ckpt_a2/case_02_mpg1.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{name: array for name, array in arrays.items() if name != "rng/mpg_directions"})
    with pytest.raises(CaseError, match="mpg_directions"):
        load_cases(copied)


def test_unknown_robot(copied: Path) -> None:
    path = copied / "ckpt_a1/case_01_plain.json"
    description = {**json.loads(path.read_text()), "data_config_name": "?", "dataset_name": "?", "embodiment_tag": "?"}
    path.write_text(json.dumps(description))
    assert load_cases(copied)[0].embodiment.name == "libero"  # by its keys
    arrays = dict(np.load(path.with_suffix(".npz")))
    np.savez(path.with_suffix(".npz"), **{n: a for n, a in arrays.items() if not n.startswith("in/video")})
    with pytest.raises(OnbeatError, match="none of the embodiments"):
        load_cases(copied)
