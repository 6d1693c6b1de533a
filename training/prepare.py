"""From a recipe to a run at step 0: data read, the checkpoint's companions written, weights made, losses set up.

A = 200 unified slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onbeat.embodiment.metadata import save_statistics
from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.language import PolicyLanguage
from onbeat.training.auxiliary import PlaceQuestion
from onbeat.training.config_file import save_config
from onbeat.training.data.sample import Source
from onbeat.training.dataset import (
    Steps,
    action_slots,
    assemble_steps,
    measure_statistics,
    read_recordings,
    split_recordings,
)
from onbeat.training.feed import EpochOrder, Feed, Order
from onbeat.training.fit import Fit
from onbeat.training.model.policy import Policy, create_policy
from onbeat.training.objective import Objective
from onbeat.training.recipe import Recipe, RecipeError
from onbeat.training.text import fit_tokenizer, write_tokenizer

FIRST_VELOCITY = 0.1  # deviations: the decoder starts by saying little rather than something wrong


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs before its first step.

    held_out: what is validated on, source by source. languages: by embodiment, for the robot and for training alike.
    moved: (A,) bool, the action slots of any robot of the run. vocabulary: rows of the embedding.
    """

    sources: Sequence[Source]
    order: Order
    held_out: Sequence[Source]
    languages: Mapping[str, PolicyLanguage]
    moved: Tensor
    vocabulary: int


def prepare(recipe: Recipe, data: Path, out: Path) -> Prepared:
    """Read the data and write the checkpoint's tokenizer, statistics and config.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return prepare_demonstrations(recipe, data, out)


def prepare_demonstrations(recipe: Recipe, data: Path, out: Path) -> Prepared:
    """One robot, its demonstrations all in memory."""
    if not recipe.embodiment:
        raise RecipeError("a recipe without [data] is of one robot's demonstrations: name the robot as embodiment")
    robot = load_embodiment(recipe.embodiment)
    recordings = read_recordings(data, robot, recipe.network.image_size)
    fitted, held_out = split_recordings(recordings.demonstrations, recipe.fitting.held_out, recipe.seed)
    tokenizer = fit_tokenizer(sentences(recipe, [recordings.instruction]))
    write_tokenizer(tokenizer, out)
    save_statistics(measure_statistics(fitted, robot, recipe.dataset), out)
    save_config(recipe.network.configure(tokenizer.get_vocab_size(), recipe.delays), out)
    language = PolicyLanguage.from_folder(out, embodiment=robot, dataset=recipe.dataset)
    steps = assemble_steps(fitted, language, recordings.instruction)
    return Prepared(
        [steps],
        EpochOrder(len(steps), recipe.fitting.batch, recipe.seed),
        [assemble_steps(held_out, language, recordings.instruction)],
        {robot.name: language},
        action_slots(robot),
        tokenizer.get_vocab_size(),
    )


def sentences(recipe: Recipe, instructions: Sequence[str]) -> list[str]:
    """The text around an observation, piece by piece as the prompt has it."""
    return [f"system\n{recipe.network.system_message}", "user\n", "assistant\n", "\n", *instructions]


def start_fit(recipe: Recipe, prepared: Prepared) -> Fit:
    """A run at step 0."""
    policy = fresh_policy(recipe, prepared)
    device = torch.device(recipe.fitting.device)
    place = place_question(recipe, policy, prepared)
    views = max(len(language.settings.views) for language in prepared.languages.values())
    objective = Objective(
        policy.config,
        recipe.fitting,
        moved=prepared.moved.to(device),
        views=views,
        place=place and place.to(device),
        asks_words=any(source.kind == "vision_language" for source in prepared.sources),
    )
    feed = Feed(prepared.sources, prepared.order, recipe.seed, recipe.fitting.loaders)
    return Fit(recipe, policy, feed, objective)


def fresh_policy(recipe: Recipe, prepared: Prepared) -> Policy:
    """Random weights that keep the variance of what passes, and no weight into or out of slots that no data moves.

    With those at zero, and their inputs zero in training, they stay so: noise in unused slots never reaches an action.
    """
    policy = create_policy(recipe.network.configure(prepared.vocabulary, recipe.delays), recipe.seed)
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(module.weight[0].numel() ** -0.5 / module.weight.std())
        policy.action_encoder.W1.weight[:, ~prepared.moved] = 0
        policy.action_decoder.layer2.weight[~prepared.moved] = 0
        policy.action_decoder.layer2.weight.mul_(FIRST_VELOCITY)
    return policy


def place_question(recipe: Recipe, policy: Policy, prepared: Prepared) -> PlaceQuestion | None:
    """The auxiliary question, where demonstrations in memory tell the object's place."""
    steps = prepared.sources[0]
    if not isinstance(steps, Steps):
        return None
    torch.manual_seed(recipe.seed)
    return PlaceQuestion(policy.config, steps.prompt, steps.frames.shape[1], torch.from_numpy(steps.cube_m))
