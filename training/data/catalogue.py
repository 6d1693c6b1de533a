"""The [data] of a recipe: which datasets, read as which robots, in which shares; opened, measured, split, made sources.

[data]
simulation_cap = 0.26
kinds = { robot = 2, human = 1, simulation = 1, vision_language = 0.2 }
keep = { so101 = 0.5 }
[data.sources.twin]
path = "out/demonstrations"
kind = "simulation"
embodiment = "so101"
columns = "twin_columns.toml"
boosts = { contact = 3.0 }
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.language import PolicyLanguage
from onbeat.training.data.columns import read_columns
from onbeat.training.data.layout import DataError
from onbeat.training.data.mixture import CAP, Proportions
from onbeat.training.data.reader import check_files, check_times, open_dataset
from onbeat.training.data.robot_data import RobotData
from onbeat.training.data.sample import Kind, Source
from onbeat.training.data.sources import QuestionSource, RobotSource, read_questions
from onbeat.training.data.statistics import Measured, measure_data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUESTIONS: Kind = "vision_language"


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """One source. path: a LeRobot dataset's folder, or for kind "vision_language" a file of questions (sources.py).

    embodiment: a robot's name or file; unused for questions. columns: a TOML file (columns.py); "" is the defaults.
    boosts, holds_at_end, in_memory: see RobotSource.
    """

    path: str
    kind: Kind
    embodiment: str = ""
    columns: str = ""
    boosts: Mapping[str, float] = field(default_factory=dict)
    holds_at_end: bool = False
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class DataSettings:
    """All sources of a run by name, and their shares: see Proportions."""

    sources: Mapping[str, SourceSettings]
    kinds: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, float] = field(default_factory=dict)
    simulation_cap: float = CAP
    epoch: int | None = None

    @property
    def proportions(self) -> Proportions:
        return Proportions(self.kinds, self.keep, self.simulation_cap, self.epoch)


@dataclass(frozen=True, slots=True)
class Part:
    """One robot source, opened. fitted, held_out: numbers of its episodes."""

    settings: SourceSettings
    data: RobotData
    fitted: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Questions:
    """One source without a robot. fitted, held_out: numbers of its questions."""

    path: Path
    fitted: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The datasets of a run, opened. questions: the sources without a robot. All by name."""

    parts: Mapping[str, Part]
    questions: Mapping[str, Questions]

    @property
    def robots(self) -> dict[str, Embodiment]:
        """By name, in the order of the recipe."""
        return {part.data.robot.name: part.data.robot for part in self.parts.values()}

    def texts(self) -> list[str]:
        """Everything that is told or answered, for a tokenizer that is yet to be fitted."""
        tasks = [task for part in self.parts.values() for task in part.data.dataset.tasks.values()]
        rows = [row for own in self.questions.values() for row in read_questions(own.path)]
        return list(dict.fromkeys([*tasks, *(row[key] for row in rows for key in ("question", "answer"))]))

    def measure(self, name: str, chunk: int) -> Measured:
        """Statistics of the fitted episodes alone; one set per robot beside the merged one where there are several."""
        parts = list(self.parts.values())
        return measure_data(name, [part.data for part in parts], chunk, [part.fitted for part in parts])

    def sources(self, languages: Mapping[str, PolicyLanguage]) -> list[Source]:
        """What is trained on. languages: by embodiment; questions take the first one's views' side and tokenizer."""
        robots: list[Source] = [_source(name, p, languages, p.fitted) for name, p in self.parts.items()]
        return robots + [_asking(name, q, languages, q.fitted) for name, q in self.questions.items()]

    def held_out(self, languages: Mapping[str, PolicyLanguage]) -> list[Source]:
        """What is validated on: the robots' episodes and the questions that are not fitted."""
        robots: list[Source] = [_source(name, p, languages, p.held_out) for name, p in self.parts.items() if p.held_out]
        return robots + [_asking(name, q, languages, q.held_out) for name, q in self.questions.items() if q.held_out]


def open_catalogue(settings: DataSettings, *, held_out: float, seed: int) -> Catalogue:
    """Open every source and split it, a dataset by its episodes. held_out: the share not fitted. Raises DataError."""
    robots = {name: s for name, s in settings.sources.items() if s.kind != QUESTIONS}
    if not robots:
        raise DataError("[data] names no source of a robot or a hand: give one, or there are no actions to learn")
    parts = {name: _open_part(name, own, held_out, seed) for name, own in robots.items()}
    paths = {name: Path(s.path) for name, s in settings.sources.items() if s.kind == QUESTIONS}
    questions = {
        name: Questions(path, *split(len(read_questions(path)), held_out, seed)) for name, path in paths.items()
    }
    return Catalogue(parts, questions)


def split(count: int, held_out: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(fitted, held out) of so many episodes or questions, drawn by `seed`; at least one of each, but one is fitted."""
    aside = min(max(1, round(held_out * count)), count - 1) if held_out > 0 else 0
    order = np.random.default_rng(seed).permutation(count).tolist()
    return tuple(sorted(order[aside:])), tuple(sorted(order[:aside]))


def _open_part(name: str, settings: SourceSettings, held_out: float, seed: int) -> Part:
    if not settings.embodiment:
        raise DataError(f"[data.sources.{name}] names no embodiment: say whose numbers {settings.path} holds")
    dataset, robot = open_dataset(Path(settings.path)), load_embodiment(settings.embodiment)
    check_files(dataset)
    for episode in range(len(dataset.episodes)):
        check_times(dataset, episode)
    where = settings.columns or f"[data.sources.{name}]"
    columns = read_columns(_read_toml(settings.columns), robot, robot.views, dataset.info.features, where)
    data = RobotData(dataset, robot, columns)
    return Part(settings, data, *split(len(dataset.episodes), held_out, seed))


def _source(name: str, part: Part, languages: Mapping[str, PolicyLanguage], episodes: Sequence[int]) -> RobotSource:
    own = part.settings
    return RobotSource(
        part.data,
        languages[part.data.robot.name],
        kind=own.kind,
        name=name,
        episodes=episodes,
        boosts=own.boosts,
        holds_at_end=own.holds_at_end,
        in_memory=own.in_memory,
    )


def _asking(name: str, own: Questions, languages: Mapping[str, PolicyLanguage], rows: Sequence[int]) -> QuestionSource:
    return QuestionSource(own.path, next(iter(languages.values())), name=name, rows=rows)


def _read_toml(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as TOML ({error}): give a table of columns") from None
