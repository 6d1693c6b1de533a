"""Random small checkpoints of many shapes, complete on disk: what export and loading are tested with."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onbeat.training.checkpoint import companions, save_checkpoint
from onbeat.training.config import (
    ACTIVATIONS,
    IDLE_SLOTS,
    DecoderConfig,
    DelayConfig,
    ExpertsConfig,
    GateConfig,
    PolicyConfig,
    StreamConfig,
    VisionConfig,
)
from onbeat.training.config_file import load_config
from onbeat.training.model.adapters import ADAPTER
from onbeat.training.model.policy import Policy

# Norm scales, LayerScale and biases are drawn around these, so that forgetting any of them shows.
SCALE_MEAN, SCALE_DEVIATION, BIAS_DEVIATION = 1.0, 0.2, 0.1
ADAPTER_DEVIATION = 0.05  # near 1 / sqrt(200)


def random_config(seed: int, vocabulary: int) -> PolicyConfig:
    """A small configuration with every choice of the format drawn anew. vocabulary: rows of the embedding."""
    draw = random.Random(seed)
    und, gen = _random_stream(draw), _random_stream(draw)
    if draw.random() < 0.25:
        gen = StreamConfig(und.width, und.ffn_width, gen.activation, gen.norm_epsilon)
    config = PolicyConfig(
        vision=_random_vision(draw),
        decoder=_random_decoder(draw, und, gen, vocabulary),
        chunk=draw.randint(12, 16),
        flow_steps=draw.choice((1, 3, 4, 4, 10)),
        gate=_random_gate(draw),
        delay=draw.choice((DelayConfig(), DelayConfig(trained=True, simulated=6))),
        prompt_template=draw.choice(("long", "short")),
        template=draw.choice(("being_h0", "internvl2_5", "internlm2-chat")),
    )
    experts = _random_experts(draw, config.decoder.layers)
    return replace(
        config,
        decoder=replace(config.decoder, experts=experts),
        adapters=draw.random() < 0.5,
        idle_slots=draw.choice(IDLE_SLOTS),
    )


def _random_experts(draw: random.Random, layers: int) -> ExpertsConfig | None:
    if layers == 1 or draw.random() < 0.4:
        return None
    count = draw.randint(1, 5)
    return ExpertsConfig(
        foundation_layers=draw.randint(1, layers - 1),
        count=count,
        top_k=draw.randint(1, min(count, 3)),
        routing=draw.choice(("observation", "observation", "token")),
    )


def _random_vision(draw: random.Random) -> VisionConfig:
    heads, layers = draw.choice((1, 2, 3)), draw.randint(1, 3)
    return VisionConfig(
        width=heads * 8 * draw.randint(1, 2),
        ffn_width=8 * draw.randint(3, 8),
        layers=layers,
        heads=heads,
        image_size=28 * draw.randint(1, 3),
        select_layer=draw.choice((-1, -1, -2, layers)),
        qkv_bias=draw.random() < 0.75,
    )


def _random_decoder(draw: random.Random, und: StreamConfig, gen: StreamConfig, vocabulary: int) -> DecoderConfig:
    kv_heads = draw.choice((1, 2, 3))
    return DecoderConfig(
        und=und,
        gen=gen,
        layers=draw.randint(1, 4),
        heads=kv_heads * draw.choice((1, 2, 4)),
        kv_heads=kv_heads,
        head_dim=2 * draw.randint(3, 10),
        vocabulary=vocabulary,
        rope_theta=draw.choice((1e4, 1e6)),
        rope=draw.choice(("bf16", "fp32")),
        tied=draw.random() < 0.4,
    )


def _random_stream(draw: random.Random) -> StreamConfig:
    return StreamConfig(
        width=8 * draw.randint(2, 8),
        ffn_width=8 * draw.randint(2, 12),
        activation=draw.choice(("silu", "silu", *ACTIVATIONS)),
        norm_epsilon=draw.choice((1e-6, 1e-5, 1e-2)),
    )


def _random_gate(draw: random.Random) -> GateConfig:
    return GateConfig(
        present=draw.random() < 0.7,
        strength=draw.choice((0.1, 0.3)),
        temperature=draw.choice((1.0, 2.0)),
        directions=draw.choice((8, 16)),
        refinements=draw.choice((1, 1, 2, 3)),
        first_pass=draw.choice(("published", "published", "projected")),
        anchor_bucket=draw.choice((0, 0, 1000)),
    )


@torch.no_grad()
def random_policy(config: PolicyConfig, seed: int) -> Policy:
    """Weights of the size that keeps activations near 1 through every part, so that no mistake is hidden by scale."""
    policy, generator = Policy(config), torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        _fill(name, parameter, generator)
    return policy


def _fill(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    drawn = torch.randn(parameter.shape, generator=generator)
    if ADAPTER in name:
        parameter.copy_(drawn * ADAPTER_DEVIATION)
    elif name.endswith("bias"):
        parameter.copy_(drawn * BIAS_DEVIATION)
    elif parameter.ndim == 1:
        parameter.copy_(SCALE_MEAN + SCALE_DEVIATION * drawn)
    else:
        parameter.copy_(drawn / _fan_in(name, parameter) ** 0.5)


def _fan_in(name: str, weight: Tensor) -> int:
    is_table = "embed" in name and "patch_embedding" not in name
    return 1 if is_table else weight[0].numel()


def write_random_checkpoint(folder: Path, seed: int, like: Path, config: PolicyConfig | None = None) -> Policy:
    """Write a complete checkpoint folder and return its policy.

    like: a checkpoint folder whose tokenizer and metadata are copied. config: None draws one from the seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in companions(like):
        shutil.copy(path, folder / path.name)
    config = config or random_config(seed, load_config(like).decoder.vocabulary)
    policy = random_policy(config, seed)
    save_checkpoint(policy, folder)
    return policy
