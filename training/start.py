"""What weights a run starts from: random ones, or a checkpoint's, with experts, adapters or a gate added.

A = 200 unified slots, E and H widths of the action and understanding streams.
"""

import shutil
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onbeat.embodiment.metadata import SUFFIX
from onbeat.embodiment.robot import StateKey
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.training.checkpoint import companions, load_checkpoint
from onbeat.training.config import PolicyConfig
from onbeat.training.config_file import load_config
from onbeat.training.model.adapters import activate_slots
from onbeat.training.model.gating import ManifoldGate
from onbeat.training.model.policy import Policy, create_policy
from onbeat.training.recipe import Network, Recipe, RecipeError, delay_config
from onbeat.training.upcycle import upcycle

FIRST_VELOCITY = 0.1  # deviations: the decoder starts by saying little rather than something wrong
ADDED = ("experts", "gate", "adapters", "delays", "delay_exponential")  # what [network] may say beside start_from


def slots_of(keys: Iterable[StateKey]) -> Tensor:
    """Which of the unified slots some keys use: (A,) bool."""
    used = torch.zeros(UNIFIED_DIM, dtype=torch.bool)
    for key in keys:
        used[key.start : key.stop] = True
    return used


def start_policy(recipe: Recipe, vocabulary: int, state: Tensor, action: Tensor) -> Policy:
    """Ready to be trained. vocabulary: rows of a fresh embedding. state, action: (A,) bool, the run's slots."""
    policy = continued_policy(recipe) if recipe.start_from else fresh_policy(recipe, vocabulary, action)
    activate_slots(policy, state, action)
    return policy


def fresh_policy(recipe: Recipe, vocabulary: int, action: Tensor) -> Policy:
    """Random weights that keep the variance of what passes, and no weight into or out of slots that no data moves.

    With those at zero, and their inputs zero in training, they stay so: noise in unused slots never reaches an action.
    """
    policy = create_policy(recipe.network.configure(vocabulary, recipe.delays), recipe.seed)
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(module.weight[0].numel() ** -0.5 / module.weight.std())
        policy.action_encoder.W1.weight[:, ~action] = 0
        policy.action_decoder.layer2.weight[~action] = 0
        policy.action_decoder.layer2.weight.mul_(FIRST_VELOCITY)
    return policy


def continued_policy(recipe: Recipe) -> Policy:
    """The checkpoint that the recipe names, extended by what it asks for; what it answers is as before."""
    check_sizes(recipe.network)
    policy, network = load_checkpoint(recipe.start_from), recipe.network
    adapters = network.adapters is not None and network.adapters.enabled and not policy.config.adapters
    if network.experts is not None or adapters:
        policy = upcycle(policy, network.experts, adapters=adapters, seed=recipe.seed)
    if network.gate is not None and policy.mpg is None:
        policy.mpg = open_gate(policy.config, recipe.seed)
    policy.config = continued_config(recipe, policy.config)
    return policy


def continued_config(recipe: Recipe, config: PolicyConfig) -> PolicyConfig:
    """A checkpoint's configuration with the gate and the delays of the recipe, where it has any."""
    network = recipe.network
    if network.gate is not None:
        config = replace(config, gate=network.gate.configure())
    if network.delays or recipe.delays:
        delay = delay_config(network.delays, network.delay_exponential, config.chunk, recipe.delays)
        config = replace(config, delay=delay)
    return replace(config, idle_slots="zero") if config.adapters else config  # else others' adapters would meet noise


def open_gate(config: PolicyConfig, seed: int) -> ManifoldGate:
    """A gate through which features pass unchanged: up and down by a matrix and its transpose, with no correction yet.

    Raises RecipeError where the understanding stream is narrower than the action stream, which no gate can pass.
    """
    if config.decoder.und.width < config.decoder.gen.width:
        raise RecipeError(
            "[network.gate]: the understanding stream is narrower than the action stream: leave the gate out"
        )
    gate, generator = ManifoldGate(config.decoder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in (gate.obs_proj, gate.action_proj, gate.action_to_vlm_proj, gate.vlm_to_action_proj):
            nn.init.zeros_(linear.bias)
        for linear in (gate.obs_proj, gate.action_proj, gate.action_to_vlm_proj):
            nn.init.orthogonal_(linear.weight, generator=generator)
        gate.vlm_to_action_proj.weight.copy_(gate.action_to_vlm_proj.weight.T)
        nn.init.zeros_(gate.enhancement_proj.weight)
        nn.init.zeros_(gate.enhancement_proj.bias)
    return gate


def check_sizes(network: Network) -> None:
    """Raise RecipeError for a size beside start_from: sizes are the checkpoint's."""
    plain = Network()
    for field in fields(network):
        if field.name not in ADDED and getattr(network, field.name) != getattr(plain, field.name):
            raise RecipeError(f"[network]: {field.name} is that of the checkpoint in start_from: leave it out")


def image_size(recipe: Recipe) -> int:
    """The side of the network's views, in pixels."""
    started = load_config(Path(recipe.start_from)) if recipe.start_from else None
    return recipe.network.image_size if started is None else started.vision.image_size


def copy_tokenizer(source: Path, out: Path) -> None:
    """The checkpoint's tokenizer; its statistics are of other data."""
    for path in companions(source):
        if path.parent == source and not path.name.endswith(SUFFIX):
            shutil.copy(path, out / path.name)
