"""From a recipe to a run at step 0: data read, the checkpoint's companions written, weights made, losses set up.

A = 200 unified slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onbeat.embodiment.metadata import MERGED, save_statistics
from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.language import PolicyLanguage
from onbeat.training.auxiliary import PlaceQuestion
from onbeat.training.config import PolicyConfig
from onbeat.training.config_file import save_config
from onbeat.training.data.catalogue import DataSettings, open_catalogue
from onbeat.training.data.mixture import Mixture, plan_mixture
from onbeat.training.data.sample import Source
from onbeat.training.dataset import (
    Steps,
    assemble_steps,
    measure_statistics,
    read_recordings,
    split_recordings,
)
from onbeat.training.feed import EpochOrder, Feed, Order
from onbeat.training.fit import Fit
from onbeat.training.model.policy import Policy
from onbeat.training.objective import Objective
from onbeat.training.parallel import world
from onbeat.training.recipe import Recipe, RecipeError
from onbeat.training.start import continued_policy, copy_tokenizer, image_size, slots_of, start_policy
from onbeat.training.text import fit_tokenizer, write_tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs before its first step.

    held_out: what is validated on, source by source. languages: by embodiment, for the robot and for training alike.
    vocabulary: rows of the embedding. table: what is trained on, for people.
    """

    sources: Sequence[Source]
    order: Order
    held_out: Sequence[Source]
    languages: Mapping[str, PolicyLanguage]
    vocabulary: int
    table: str

    @property
    def robots(self) -> list[Embodiment]:
        return [language.embodiment for language in self.languages.values()]

    def prompt_lengths(self) -> list[int]:
        """The number of tokens of each source's first prompt."""
        generator = np.random.default_rng(0)
        return [len(source.sample(0, generator).prompt.token_ids) for source in self.sources]

    @property
    def state_slots(self) -> Tensor:
        """(A,) bool, of any robot of the run."""
        return slots_of(key for robot in self.robots for key in robot.state)

    @property
    def action_slots(self) -> Tensor:
        """(A,) bool, of any robot of the run."""
        return slots_of(key for robot in self.robots for key in robot.action)


def prepare(recipe: Recipe, data: Path, out: Path) -> Prepared:
    """Read the data and write the checkpoint's tokenizer, statistics and config.json into `out`.

    data: the folder of demonstrations, where the recipe has no [data].
    """
    out.mkdir(parents=True, exist_ok=True)
    if recipe.data is None:
        return prepare_demonstrations(recipe, data, out)
    return prepare_mixture(recipe, recipe.data, out)


def prepare_demonstrations(recipe: Recipe, data: Path, out: Path) -> Prepared:
    """One robot, its demonstrations all in memory."""
    robot = load_embodiment(recipe.embodiment)
    recordings = read_recordings(data, robot, image_size(recipe))
    fitted, held_out = split_recordings(recordings.demonstrations, recipe.fitting.held_out, recipe.seed)
    config = write_companions(recipe, [recordings.instruction], out)
    save_statistics(measure_statistics(fitted, robot, recipe.dataset), out)
    language = PolicyLanguage.from_folder(out, embodiment=robot, dataset=recipe.dataset)
    steps = assemble_steps(fitted, language, recordings.instruction)
    return Prepared(
        [steps],
        EpochOrder(len(steps), recipe.fitting.batch, recipe.seed),
        [assemble_steps(held_out, language, recordings.instruction)],
        {robot.name: language},
        config.decoder.vocabulary,
        f"{len(fitted)} demonstrations of {robot.name} in {data}, {len(steps):,} steps",
    )


def prepare_mixture(recipe: Recipe, data: DataSettings, out: Path) -> Prepared:
    """Datasets of one robot or several, hands, and questions in words."""
    catalogue = open_catalogue(data, held_out=recipe.fitting.held_out, seed=recipe.seed)
    config = write_companions(recipe, catalogue.texts(), out)
    catalogue.measure(recipe.dataset, config.chunk).save(out)
    robots, batch = catalogue.robots, recipe.fitting.batch
    languages = {name: speak(recipe, robot, out, len(robots)) for name, robot in robots.items()}
    sources = catalogue.sources(languages)
    plan = plan_mixture(sources, data.proportions, batch)
    return Prepared(
        sources,
        Mixture(sources, plan, batch=batch, seed=recipe.seed),
        catalogue.held_out(languages),
        languages,
        config.decoder.vocabulary,
        plan.table(),
    )


def write_companions(recipe: Recipe, texts: Sequence[str], out: Path) -> PolicyConfig:
    """Tokenizer and config.json: fitted to the texts and the recipe, or those of the checkpoint that is continued."""
    if recipe.start_from:
        copy_tokenizer(Path(recipe.start_from), out)
        config = continued_policy(recipe).config
    else:
        tokenizer = fit_tokenizer(sentences(recipe, texts))
        write_tokenizer(tokenizer, out)
        config = recipe.network.configure(tokenizer.get_vocab_size(), recipe.delays)
    save_config(config, out)
    return config


def speak(recipe: Recipe, robot: Embodiment, out: Path, robots: int) -> PolicyLanguage:
    """A robot's language, by its own statistics where there are several robots."""
    variant = robot.name if robots > 1 else MERGED
    return PolicyLanguage.from_folder(out, embodiment=robot, dataset=recipe.dataset, variant=variant)


def sentences(recipe: Recipe, instructions: Sequence[str]) -> list[str]:
    """The text around an observation, piece by piece as the prompt has it."""
    return [f"system\n{recipe.network.system_message}", "user\n", "assistant\n", "\n", *instructions]


def start_fit(recipe: Recipe, prepared: Prepared) -> Fit:
    """A run at step 0."""
    if recipe.fitting.batch < world() * recipe.fitting.accumulate:
        raise RecipeError(
            f"batch is {recipe.fitting.batch}: give each of {world()} processes one in every part of a step"
        )
    if recipe.fitting.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is cuda, and PyTorch finds no GPU here: give cpu")
    device = torch.device(recipe.fitting.device)
    policy = start_policy(recipe, prepared.vocabulary, prepared.state_slots, prepared.action_slots)
    place = place_question(recipe, policy, prepared)
    objective = Objective(
        policy.config,
        recipe.fitting,
        moved=moved_slots(policy, prepared).to(device),
        views=max(len(language.settings.views) for language in prepared.languages.values()),
        place=place and place.to(device),
        asks_words=any(source.kind == "vision_language" for source in prepared.sources),
    )
    feed = Feed(prepared.sources, prepared.order, recipe.seed, recipe.fitting.loaders)
    return Fit(recipe, policy, feed, objective)


def moved_slots(policy: Policy, prepared: Prepared) -> Tensor:
    """(A,) bool: the slots of the run's robots, and those that the network reads already, which are never silent."""
    reads = (policy.action_encoder.W1.weight != 0).any(0)
    return prepared.action_slots | reads


def place_question(recipe: Recipe, policy: Policy, prepared: Prepared) -> PlaceQuestion | None:
    """The auxiliary question, where demonstrations in memory tell the object's place."""
    steps = prepared.sources[0]
    if not isinstance(steps, Steps):
        return None
    torch.manual_seed(recipe.seed)
    return PlaceQuestion(policy.config, steps.prompt, steps.frames.shape[1], torch.from_numpy(steps.cube_m))
