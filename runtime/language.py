"""Everything between a robot's units and the network's: words, pixels, state in; actions out."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.metadata import (
    AUTO,
    AmbiguousVariant,
    Statistics,
    check_statistics,
    load_statistics,
    save_statistics,
)
from onbeat.embodiment.normalisation import KeyStatistics, normalise, unnormalise
from onbeat.embodiment.robot import Embodiment, StateKey
from onbeat.embodiment.rotation import AXIS_ANGLE, convert_rotation
from onbeat.embodiment.schema import load_embodiment
from onbeat.embodiment.slots import UNIFIED_DIM, suggest
from onbeat.kernels.image import resize_and_crop
from onbeat.runtime.engine import PolicyInputs
from onbeat.runtime.observation import BadState, Observation, select_observation
from onbeat.runtime.prompt import Prompt, build_prompt, instruction_template, load_tokenizer, system_message

SETTINGS_FILE = "language.json"
EMBODIMENT_FILE = "embodiment.toml"
TOKENIZER_FILE = "tokenizer.json"

Array = NDArray[np.floating[Any]]


class LanguageError(OnbeatError):
    """A folder that does not say how to speak to its policy, or settings that do not fit."""


class WrongEmbodiment(LanguageError):
    """A bundle that was made for another robot."""


class BadActions(LanguageError):
    """Action arrays that are not of the embodiment's keys and sizes."""


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    """What a checkpoint fixes of the conversation.

    views: camera names in the network's order. image_size: side in pixels. chunk: rows. system: the system message.
    template: the instruction template itself. dataset, variant: the statistics taken; None where none are needed.
    """

    embodiment: str
    views: tuple[str, ...]
    image_size: int
    tokens_per_view: int
    chunk: int
    system: str
    template: str
    dataset: str | None = None
    variant: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "LanguageSettings":
        """The inverse of `to_json`. Raises LanguageError for a field too many or too few."""
        known = [field.name for field in fields(cls)]
        odd = sorted(set(document) ^ set(known))
        if odd:
            raise LanguageError(f"'{odd[0]}' is unknown or missing in {SETTINGS_FILE}: export the bundle again")
        return cls(**{**document, "views": tuple(document["views"])})


@dataclass(frozen=True, slots=True)
class PolicyLanguage:
    """The translation for one robot and one checkpoint. Immutable; safe to share between threads."""

    settings: LanguageSettings
    embodiment: Embodiment
    tokenizer: Tokenizer
    statistics: Statistics | None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        embodiment: str | Path | Embodiment | None = None,
        dataset: str | None = None,
        variant: str | None = None,
        views: Sequence[str] | None = None,
        template: str | None = None,
    ) -> "PolicyLanguage":
        """From a checkpoint in the published format, or from a bundle (which names its own embodiment and variant).

        embodiment: needed for a checkpoint; a bundle refuses another one (WrongEmbodiment). dataset, variant: see
        `load_statistics`; None refuses to guess between several where the robot needs any. views, template: instead of
        the checkpoint's own.
        Raises LanguageError, and the errors of tokenizer, embodiment, metadata and template.
        """
        folder = Path(folder)
        if (folder / SETTINGS_FILE).exists():
            settings, robot = _bundle_settings(folder, embodiment, variant)
        else:
            settings, robot = _checkpoint_settings(folder, embodiment, dataset, variant)
        settings = replace(
            settings,
            views=tuple(views or settings.views),
            template=instruction_template(template or settings.template),
        )
        statistics = _statistics(folder, robot, settings)
        if statistics is not None:
            settings = replace(settings, dataset=statistics.dataset, variant=statistics.variant)
        return cls(settings, robot, load_tokenizer(folder), statistics)

    def save(self, folder: Path) -> list[Path]:
        """Write what `from_folder` needs (settings, embodiment, tokenizer, statistics); returns the files."""
        assert self.embodiment.source is not None, "an embodiment comes from a file"
        written = [folder / SETTINGS_FILE, folder / EMBODIMENT_FILE, folder / TOKENIZER_FILE]
        settings = json.dumps(self.settings.to_json(), indent=1, ensure_ascii=False)
        written[0].write_text(settings + "\n", encoding="utf-8")
        shutil.copyfile(self.embodiment.source, written[1])
        self.tokenizer.save(str(written[2]))
        if self.statistics is not None:
            written.append(save_statistics(self.statistics, folder))
        return written

    def inputs(self, observation: Observation, instruction: str) -> PolicyInputs:
        """The network's inputs for one observation. Raises ObservationError or InstructionError; then nothing moves."""
        seen = select_observation(observation, self.settings.views, self.embodiment.state)
        prompt = self.prompt(instruction)
        views = [resize_and_crop(frame.rgb, self.settings.image_size) for frame in seen.views.values()]
        state = self.unify_state(self.normalise_state(seen.state))
        return PolicyInputs(np.stack(views), prompt.token_ids, prompt.image_start, prompt.state_index, state)

    def prompt(self, instruction: str) -> Prompt:
        """The prefix around an observation. Raises InstructionError."""
        settings = self.settings
        return build_prompt(
            self.tokenizer,
            system=settings.system,
            template=settings.template,
            instruction=instruction,
            image_tokens=len(settings.views) * settings.tokens_per_view,
            chunk=settings.chunk,
        )

    def normalise_state(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """State values (..., d) with axis-angle rotations and in the network's units, in their own float type."""
        return {key.name: self._to_network(key, np.asarray(state[key.name]), "state") for key in self.embodiment.state}

    def unify_state(self, normalised: Mapping[str, Array]) -> NDArray[np.float32]:
        """Normalised state values (d,) in their slots: (200,) float32, 0 elsewhere. Raises BadState."""
        with np.errstate(over="ignore"):  # refused below, by name
            unified = _unify(self.embodiment.state, normalised, ())
        for key in self.embodiment.state:
            if not np.isfinite(unified[key.start : key.stop]).all():
                raise BadState(f"state '{key.name}' overflows float32 ({normalised[key.name]}): check the sensor")
        return unified

    def decode(self, actions: NDArray[np.float32]) -> dict[str, Array]:
        """Unified actions (C, 200) as values (C, d) per action key, in the robot's units and rotation forms."""
        if actions.ndim != 2 or actions.shape[1] != UNIFIED_DIM:
            raise BadActions(f"actions have shape {actions.shape}: give rows of {UNIFIED_DIM} numbers")
        return {
            key.name: self._from_network(key, actions[:, key.start : key.stop]) for key in self.embodiment.action
        }

    def encode(self, actions: Mapping[str, Array]) -> NDArray[np.float32]:
        """Action values (R, d) of every key as unified actions (R, 200) float32: the inverse of `decode`."""
        rows = _check_actions(self.embodiment, actions)
        keys = self.embodiment.action
        normalised = {key.name: self._to_network(key, actions[key.name], "action") for key in keys}
        return _unify(keys, normalised, (rows,))

    def _to_network(self, key: StateKey, values: Array, side: str) -> Array:
        if key.rotation is not None:
            values = convert_rotation(values, key.rotation, AXIS_ANGLE)
        return values if key.normalisation is None else normalise(values, key.normalisation, self._known(key, side))

    def _from_network(self, key: StateKey, values: Array) -> Array:
        if key.normalisation is not None:
            values = unnormalise(values, key.normalisation, self._known(key, "action"))
        return values if key.rotation is None else convert_rotation(values, AXIS_ANGLE, key.rotation)

    def _known(self, key: StateKey, side: str) -> KeyStatistics:
        if self.statistics is None:
            return {}
        return (self.statistics.state if side == "state" else self.statistics.action).get(key.name, {})


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises LanguageError when the folder is no checkpoint of this model."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LanguageError(f"{path} cannot be read ({error}): give a checkpoint or bundle folder") from None
    if not isinstance(config, dict) or config.get("model_type") != "beingh":
        raise LanguageError(f"{path} is not of a Being-H model (model_type 'beingh'): give a checkpoint of one")
    return config


def _bundle_settings(
    folder: Path, asked: str | Path | Embodiment | None, variant: str | None
) -> tuple[LanguageSettings, Embodiment]:
    try:
        document = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LanguageError(f"{folder / SETTINGS_FILE} cannot be read ({error}): export the bundle again") from None
    settings = LanguageSettings.from_json(document)
    robot = replace(load_embodiment(folder / EMBODIMENT_FILE), name=settings.embodiment)
    if variant not in (None, AUTO, settings.variant):
        raise LanguageError(f"{folder} was exported with variant '{settings.variant}': export it again for '{variant}'")
    wanted = asked if asked is None or isinstance(asked, Embodiment) else load_embodiment(asked)
    if wanted is not None and wanted.layout != robot.layout:
        raise WrongEmbodiment(
            f"{folder} was exported for '{robot.name}', not for '{wanted.name}' as it is here: export it for that robot"
        )
    return settings, robot


def _checkpoint_settings(
    folder: Path, asked: str | Path | Embodiment | None, dataset: str | None, variant: str | None
) -> tuple[LanguageSettings, Embodiment]:
    config = read_config(folder)
    if asked is None:
        raise LanguageError(f"{folder} is a checkpoint, which names no robot: say which embodiment it is for")
    robot = asked if isinstance(asked, Embodiment) else load_embodiment(asked)
    try:
        size, patch = config["force_image_size"], config["vit_config"]["patch_size"]
        settings = LanguageSettings(
            embodiment=robot.name,
            views=robot.views,
            image_size=size,
            tokens_per_view=int((size // patch * config["downsample_ratio"]) ** 2),
            chunk=config["action_chunk_length"],
            system=system_message(config["template"], config.get("system_message")),
            template=config.get("prompt_template", "long"),
            dataset=dataset,
            variant=variant,
        )
    except KeyError as error:
        raise LanguageError(f"{folder}/config.json has no {error}: give a complete checkpoint") from None
    return settings, robot


def _statistics(folder: Path, robot: Embodiment, settings: LanguageSettings) -> Statistics | None:
    """The statistics of the settings' data set; None for a robot that needs none, unless some are named."""
    if not robot.needs_statistics and settings.dataset is None and settings.variant is None:
        return None
    try:
        statistics = load_statistics(folder, settings.dataset, settings.variant)
    except AmbiguousVariant:
        check_statistics(load_statistics(folder, settings.dataset, AUTO), robot)  # of another robot: no variant helps
        raise
    check_statistics(statistics, robot)
    return statistics


def _check_actions(robot: Embodiment, actions: Mapping[str, Array]) -> int:
    """The number of rows that all keys have. Raises BadActions."""
    names = [key.name for key in robot.action]
    for name in actions:
        if name not in names:
            raise BadActions(f"'{name}' is no action of {robot.name}: {suggest(name, names)}")
    lengths = set()
    for key in robot.action:
        values = actions.get(key.name)
        if values is None or values.ndim != 2 or values.shape[1] != key.size:
            raise BadActions(f"action '{key.name}' of {robot.name} must be rows of {key.size} numbers: give them")
        lengths.add(len(values))
    if len(lengths) != 1:
        raise BadActions(f"action keys have {sorted(lengths)} rows: give each the same number")
    return lengths.pop()


def _unify(keys: Sequence[StateKey], values: Mapping[str, Array], rows: tuple[int, ...]) -> NDArray[np.float32]:
    unified = np.zeros((*rows, UNIFIED_DIM), np.float32)
    for key in keys:
        unified[..., key.start : key.stop] = values[key.name]
    return unified
