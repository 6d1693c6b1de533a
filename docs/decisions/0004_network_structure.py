"""Figures of decision 0004: floating point operations, counted, of the network with and without a kept prefix.

python docs/decisions/0004_network_structure.py
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from onbeat.training.config import DecoderConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.model.policy import Policy

STREAM = StreamConfig(128, 384)
SMALL = PolicyConfig(
    vision=VisionConfig(128, 384, 4, 4, image_size=112),
    decoder=DecoderConfig(STREAM, STREAM, layers=4, heads=4, kv_heads=2, head_dim=32, vocabulary=600, tied=True),
)
RELEASED = PolicyConfig(
    vision=VisionConfig(1024, 4096, 24, 16, image_size=224),
    decoder=DecoderConfig(StreamConfig(2048, 6144), StreamConfig(1024, 3072), 28, 16, 8, 128, vocabulary=151_936),
)
TEXT = 60  # tokens beside the images
VIEWS = 2


def count(config: PolicyConfig, observations: int, draws: int, *, train: bool) -> float:
    """GFLOP of one prefix pass and `draws` velocities for each observation; on shapes alone, no memory."""
    images, side, chunk = VIEWS * config.vision.tokens_per_view, config.vision.image_size, config.chunk
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        policy = Policy(config).to("meta")
        pixels, state = torch.empty(observations, VIEWS, 3, side, side), torch.empty(observations, 200)
        ids = torch.empty(observations, images + TEXT, dtype=torch.long)
        cache = policy.encode_prefix(pixels, ids, 20, 20 + images + 1, state)
        if draws:
            shape = (observations, draws, chunk)
            velocity = policy.velocity(cache, torch.empty(*shape, 200), torch.empty(shape, dtype=torch.long))
            if train:
                velocity.sum().backward()
    return counter.get_total_flops() / 1e9


def main() -> None:
    prefix = count(RELEASED, 1, 0, train=False)
    flow = count(RELEASED, 1, 1, train=False) - prefix
    print(f"released 2B, prefix once             {prefix:8.1f} GFLOP")
    print(f"released 2B, one flow step           {flow:8.1f} GFLOP")
    for steps in (4, 8, 12):
        kept, again = prefix + steps * flow, steps * (prefix + flow)
        print(f"{steps:2} steps, prefix kept / recomputed  {kept:8.0f} / {again:.0f} GFLOP ({again / kept:.1f}x)")
    shared, apart = count(SMALL, 16, 8, train=True), count(SMALL, 128, 1, train=True)
    print(f"small, training step, 16 observations x 8 draws / 128 x 1  {shared:.1f} / {apart:.1f} GFLOP")


if __name__ == "__main__":
    main()
