"""Where samples come from: a LeRobot dataset read as one robot's, and questions about images.

V views, S image side, C chunk rows, A = 200 unified slots, N samples.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.kernels.image import resize_and_crop
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.prompt import TURN_END, Prompt, build_prompt, tokenize
from onbeat.training.data.images import decode_image
from onbeat.training.data.layout import DataError
from onbeat.training.data.robot_data import RobotData
from onbeat.training.data.sample import Kind, Sample


class RobotSource:
    """A LeRobot dataset, or some of its episodes, as samples. Every frame is one.

    language: of the robot and the network; it fixes views, image side and chunk. boosts: by event, how many times as
    often as others a frame comes whose chunk holds that event. holds_at_end: whether the robot stays where an episode
    ends, so that rows beyond it count. in_memory: frames are decoded once, now.
    """

    def __init__(
        self,
        data: RobotData,
        language: PolicyLanguage,
        *,
        kind: Kind,
        name: str | None = None,
        episodes: Sequence[int] | None = None,
        boosts: Mapping[str, float] | None = None,
        holds_at_end: bool = False,
        in_memory: bool = False,
    ) -> None:
        self.data, self.language, self.holds_at_end = data, language, holds_at_end
        self.kind: Kind = kind
        self.name = name or data.dataset.folder.name
        self.episodes = tuple(range(len(data.dataset.episodes)) if episodes is None else episodes)
        self.boosts = _check_boosts(boosts or {}, data)
        self._starts = np.cumsum([0, *(data.dataset.episodes[e].length for e in self.episodes)])
        self._slots = action_slots(data.robot)
        self._prompt = lru_cache(maxsize=4096)(language.prompt)
        self.weights = self._weigh()
        self._frames = self._decode_all() if in_memory else None

    @property
    def embodiment(self) -> str:
        return self.data.robot.name

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, index: int, generator: np.random.Generator) -> Sample:  # noqa: ARG002 (a Source's signature)
        """The frame `index` and its chunk. Raises DataError, naming file and row, where the data is damaged."""
        episode, frame = self._locate(index)
        chunk = self.data.chunk(episode, frame, self.language.settings.chunk)
        state = {name: rows[0] for name, rows in self.data.state(episode, frame, frame + 1).items()}
        task = self.data.dataset.told(episode, frame, frame + 1)[0]
        counted = np.ones_like(chunk.inside) if self.holds_at_end else chunk.inside
        return Sample(
            frames=self._views(episode, frame) if self._frames is None else self._frames[index],
            state=self.language.unify_state(self.language.normalise_state(state)),
            actions=self.language.encode(chunk.actions),
            valid=counted[:, None] & self._slots,
            prompt=self._prompt(task),
            embodiment=self.embodiment,
            task=task,
            kind=self.kind,
            marks={mark: float(self._share(episode, mark)[frame]) for mark in self.data.columns.marks},
            extra={name: self._extra(column, episode, frame) for name, column in self.data.columns.extra.items()},
        )

    def _locate(self, index: int) -> tuple[int, int]:
        place = int(np.searchsorted(self._starts, index, "right")) - 1
        return self.episodes[place], index - int(self._starts[place])

    def _weigh(self) -> NDArray[np.float64]:
        """(N,): 1, or the largest boost of the events in the sample's chunk."""
        weights = np.ones(len(self))
        for mark, boost in self.boosts.items():
            found = np.concatenate([self._share(episode, mark) > 0 for episode in self.episodes])
            weights = np.maximum(weights, np.where(found, boost, 1.0))
        return weights

    def _views(self, episode: int, frame: int) -> NDArray[np.uint8]:
        columns, size = self.data.columns.views, self.language.settings.image_size
        views = [self.data.dataset.image(episode, frame, columns[v]) for v in self.language.settings.views]
        return np.stack([np.moveaxis(resize_and_crop(rgb, size), -1, 0) for rgb in views])

    def _decode_all(self) -> NDArray[np.uint8]:
        size = self.language.settings.image_size
        frames = np.empty((len(self), len(self.language.settings.views), 3, size, size), np.uint8)
        for index in range(len(self)):
            frames[index] = self._views(*self._locate(index))
        return frames

    def _share(self, episode: int, mark: str) -> NDArray[np.float64]:
        """(T,) for every frame of an episode, the share of its chunk's time that lies at an event."""
        happens = self.data.dataset.numbers(episode, self.data.columns.marks[mark])[:, 0] > 0
        reach = self.language.settings.chunk * self.data.stride
        counted = np.cumsum([0, *happens])
        ends = np.minimum(np.arange(len(happens)) + reach, len(happens))
        return (counted[ends] - counted[:-1]) / reach

    def _extra(self, column: str, episode: int, frame: int) -> NDArray[np.float32]:
        dataset = self.data.dataset
        if dataset.feature(column).is_camera:
            return dataset.image(episode, frame, column).astype(np.float32)
        return dataset.numbers(episode, column, frame, frame + 1)[0].astype(np.float32)


class QuestionSource:
    """Questions about images with answers in words, from a file of JSON lines:

        {"images": ["kitchen.png"], "question": "what is on the table?", "answer": "a red cube"}

    images: paths from the file's folder, any number of them. There is no robot: state and actions are 0, none counts.
    rows: the numbers of the questions that are asked; all by default.
    """

    kind: Kind = "vision_language"
    embodiment = "none"

    def __init__(
        self, path: Path, language: PolicyLanguage, *, name: str | None = None, rows: Sequence[int] | None = None
    ) -> None:
        self.path, self.language, self.name = path, language, name or path.stem
        self._questions = read_questions(path)
        self._rows = tuple(range(len(self._questions)) if rows is None else rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Every question alike."""
        return np.ones(len(self))

    def sample(self, index: int, generator: np.random.Generator) -> Sample:  # noqa: ARG002 (a Source's signature)
        """Question `index`. Raises DataError for an image that cannot be read."""
        number, chunk = self._rows[index], self.language.settings.chunk
        row = self._questions[number]
        answer = tokenize(self.language.tokenizer, row["answer"]) + tokenize(self.language.tokenizer, TURN_END)
        return Sample(
            frames=self._frames(row["images"], f"{self.path} row {number}"),
            state=np.zeros(UNIFIED_DIM, np.float32),
            actions=np.zeros((chunk, UNIFIED_DIM), np.float32),
            valid=np.zeros((chunk, UNIFIED_DIM), bool),
            prompt=self._prompt(row),
            embodiment=self.embodiment,
            task=self.name,
            kind=self.kind,
            text=np.array(answer, np.int64),
        )

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        settings = self.language.settings
        return build_prompt(
            self.language.tokenizer,
            system=settings.system,
            template="short",  # the question is all there is to say
            instruction=row["question"],
            image_tokens=len(row["images"]) * settings.tokens_per_view,
            chunk=settings.chunk,
        )

    def _frames(self, names: Sequence[str], where: str) -> NDArray[np.uint8]:
        size = self.language.settings.image_size
        frames = np.empty((len(names), 3, size, size), np.uint8)
        for view, name in enumerate(names):
            try:
                data = (self.path.parent / name).read_bytes()
            except OSError as error:
                raise DataError(f"{where}: {name} cannot be read ({error.strerror}): copy the images too") from None
            rgb = np.asarray(decode_image(data, f"{where}: {name}"), np.uint8)
            frames[view] = np.moveaxis(resize_and_crop(rgb, size), -1, 0)
        return frames


def action_slots(robot: Embodiment) -> NDArray[np.bool_]:
    """Which of the unified action slots the robot uses: (A,) bool."""
    used = np.zeros(UNIFIED_DIM, bool)
    for key in robot.action:
        used[key.start : key.stop] = True
    return used


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Every question of a file: "images", "question", "answer". Raises DataError."""
    rows = [_check_question(row, f"{path} row {number}") for number, row in enumerate(_read_lines(path))]
    if not rows:
        raise DataError(f"{path} holds no question: give some, or leave the source out")
    return rows


def _check_boosts(boosts: Mapping[str, float], data: RobotData) -> dict[str, float]:
    for mark, boost in boosts.items():
        if mark not in data.columns.marks:
            raise DataError(f"{data.dataset.folder} has no column of the event '{mark}': name it under [marks]")
        if not boost >= 1:
            raise DataError(f"the boost of '{mark}' is {boost}: give 1 or more")
    return dict(boosts)


def _read_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): give one JSON object a line") from None


def _check_question(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise DataError(f"{where}: give a 'question' and an 'answer', as texts")
    return {"images": [], **row}
