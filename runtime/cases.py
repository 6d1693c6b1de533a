"""Recorded cases: what one observation was and what the published code answered, to be answered again.

A folder holds manifest.json, a list of {file, checkpoint, note}; each file is an .npz of arrays (in/*, rng/*, out/*)
with a .json beside it that says which instruction, data configuration and sampler settings it was recorded with.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.metadata import AUTO
from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.schema import find_embodiment
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.runtime.engine import Engine, SamplerSpec
from onbeat.runtime.language import SETTINGS_FILE, PolicyLanguage
from onbeat.runtime.observation import Observation, observe_recorded

# The letters of runtime/engine.py: C, I, T, M, H, and R rows of a previous chunk.

CASES_FILE = "manifest.json"
VIDEO = "video."
ACTION = "out/action."

Floats = NDArray[np.float32]


class CaseError(OnbeatError):
    """A folder or file that is no recorded case."""


@dataclass(frozen=True, slots=True)
class Case:
    """One recorded inference.

    checkpoint: folder relative to the cases. sampler: what was in effect. overrides: of config.json, as given.
    noise (I, C, 200), directions (I - 1, T, M, H), prev_chunk (R, 200). keeps_prefix: the published code kept the first
    `delay` rows of prev_chunk; False when it ignored them. variant: None where the published code chose by itself.
    actions (C, 200) and keys {name: (C, d)}: what came out.
    """

    name: str
    checkpoint: str
    note: str
    observation: Observation
    instruction: str
    noise: Floats
    directions: Floats | None
    prev_chunk: Floats | None
    delay: int
    keeps_prefix: bool
    enable_rtc: bool
    overrides: Mapping[str, Any]
    sampler: SamplerSpec
    embodiment: Embodiment
    views: tuple[str, ...]
    template: str
    dataset: str
    variant: str | None
    actions: Floats
    keys: Mapping[str, NDArray[np.floating[Any]]]


@dataclass(frozen=True, slots=True)
class Replay:
    """Largest absolute difference of the unified actions, and of each key divided by max(1, its largest value)."""

    actions: float
    keys: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest of all; nan when anything is."""
        return float(np.max([self.actions, *self.keys.values()]))


def load_cases(folder: str | Path) -> list[Case]:
    """Every case that the folder's manifest lists. Raises CaseError."""
    folder = Path(folder)
    entries = _read_json(folder / CASES_FILE, "give a folder of recorded cases")
    if not isinstance(entries, list) or not entries or not all(map(_is_entry, entries)):
        raise CaseError(
            f"{folder / CASES_FILE} is no list of cases, each with a 'file' and a 'checkpoint': record them again"
        )
    return [load_case(folder, entry["file"], entry["checkpoint"], entry.get("note", "")) for entry in entries]


def load_case(folder: Path, file: str, checkpoint: str, note: str = "") -> Case:
    """One case. Raises CaseError naming the file and what it lacks or has wrong."""
    path = folder / file
    meta = _read_json(path.with_suffix(".json"), "every case needs one")
    arrays = _read_arrays(path)
    try:
        case = _build_case(file.removesuffix(".npz"), checkpoint, note, meta, arrays)
        _check_answer(case)
    except (KeyError, TypeError, IndexError, AttributeError) as problem:
        raise CaseError(f"{path} is incomplete ({problem!r}): record the case again") from None
    return case


def case_language(folder: Path, case: Case) -> PolicyLanguage:
    """The language of a case from its checkpoint or from a bundle of it, with the case's own views and template."""
    if (folder / SETTINGS_FILE).exists():
        return PolicyLanguage.from_folder(folder, views=case.views, template=case.template)
    robot = case.embodiment
    dataset, variant = (case.dataset, case.variant or AUTO) if robot.needs_statistics else (None, None)
    return PolicyLanguage.from_folder(
        folder, embodiment=robot, dataset=dataset, variant=variant, views=case.views, template=case.template
    )


def replay_case(case: Case, engine: Engine, language: PolicyLanguage) -> Replay:
    """Answer a case again with its own noise and directions, and say how far off the answer is."""
    cache = engine.prefix(language.inputs(case.observation, case.instruction))
    kept = min(case.delay, engine.spec.chunk) if case.keeps_prefix else 0
    prev_chunk = case.prev_chunk if case.keeps_prefix else None
    result = engine.flow(cache, case.noise, directions=case.directions, prev_chunk=prev_chunk, delay=kept)
    decoded = language.decode(result.actions)
    differences = {name: _scaled_difference(decoded[name], expected) for name, expected in case.keys.items()}
    return Replay(float(np.abs(result.actions - case.actions).max()), differences)


def _scaled_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("file", "checkpoint"))


def _check_answer(case: Case) -> None:
    """Raise CaseError unless the answer has the rows of the noise, and the robot's own keys in their sizes."""
    sizes = {key.name: key.size for key in case.embodiment.action}
    unknown = sorted(case.keys.keys() - sizes.keys())
    if unknown:
        what = f"'{ACTION}{unknown[0]}' is no action of {case.embodiment.name}"
        raise CaseError(f"{case.name}: {what}: record the case again with its own data configuration")
    rows = case.noise.shape[1]
    _check_array(case, "out/action_pred", case.actions, (rows, UNIFIED_DIM))
    for name, values in case.keys.items():
        _check_array(case, ACTION + name, values, (rows, sizes[name]))


def _check_array(case: Case, name: str, values: NDArray[Any], shape: tuple[int, int]) -> None:
    # Compared as they are, a single row would be held against every row of the answer.
    if values.shape != shape or not np.issubdtype(values.dtype, np.floating):
        found = f"is {values.dtype} {values.shape}, not {shape[0]} rows of {shape[1]} numbers"
        raise CaseError(f"{case.name}: '{name}' {found}: record the case again")


def _build_case(
    name: str, checkpoint: str, note: str, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> Case:
    inputs = {key.removeprefix("in/"): array for key, array in arrays.items() if key.startswith("in/")}
    sampler = _sampler(name, meta, arrays)
    return Case(
        name=name,
        checkpoint=checkpoint,
        note=note,
        observation=observe_recorded(inputs),
        instruction=meta["instruction"],
        noise=arrays["rng/noise"][: sampler.iterations],
        directions=arrays["rng/mpg_directions"] if sampler.gate == "directions" else None,
        prev_chunk=inputs.get("prev_chunk"),
        delay=int(_number(name, {"inference_delay": meta.get("inference_delay") or 0}, "inference_delay")),
        keeps_prefix=bool(meta["rtc_active"]),
        enable_rtc=bool(meta["enable_rtc"]),
        overrides={key: _number(name, meta["overrides"], key) for key in meta["overrides"]},
        sampler=sampler,
        embodiment=_embodiment(meta, inputs),
        views=tuple(key.removeprefix(VIDEO) for key in meta["video_keys"]),
        template=meta["instruction_template"],
        dataset=meta["dataset_name"],
        variant=meta["metadata_variant"],
        actions=arrays["out/action_pred"],
        keys={key.removeprefix(ACTION): array[0] for key, array in arrays.items() if key.startswith(ACTION)},
    )


def _sampler(name: str, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SamplerSpec:
    """What the published code did, in our terms."""
    steps = int(_number(name, meta, "num_inference_timesteps"))
    if not meta["use_mpg_active"]:
        return SamplerSpec(steps, 1, "off", 0.0, 1.0, 0)
    count = arrays["rng/mpg_directions"].shape[2]
    iterations = 1 + int(_number(name, meta, "mpg_refinement_iters"))
    strength, temperature = (float(_number(name, meta, key)) for key in ("mpg_lambda", "mpg_gate_temperature"))
    return SamplerSpec(steps, iterations, "directions", strength, temperature, count)


def _number(name: str, meta: Mapping[str, Any], key: str) -> bool | int | float:
    """A number of the case `name`, as it stands. Raises CaseError, and KeyError where there is none."""
    value = meta[key]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CaseError(f"{name}: '{key}' is {value!r}, not a number: correct it or record the case again")
    return value


def _embodiment(meta: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]]) -> Embodiment:
    return find_embodiment(
        data_config=meta.get("data_config_name"),
        dataset=meta["dataset_name"],
        tag=meta.get("embodiment_tag"),
        keys=list(inputs),
    )


def _read_json(path: Path, absent: str) -> Any:
    """The document; `absent` is the remedy where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CaseError(f"there is no {path}: {absent}") from None
    except (OSError, ValueError) as problem:
        raise CaseError(f"{path} is no readable JSON ({problem}): record it again") from None


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name.startswith(("in/", "rng/", "out/"))}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as problem:
        raise CaseError(f"{path} cannot be read ({problem}): record the case again") from None
