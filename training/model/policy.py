"""The whole network: views, text and state to a cache; noisy actions and the cache to a velocity."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onbeat.training.config import PolicyConfig
from onbeat.training.model.connector import Connector
from onbeat.training.model.decoder import Decoder, KeysValues, RmsNorm
from onbeat.training.model.gating import ManifoldGate
from onbeat.training.model.heads import UNIFIED, ActionEncoder, TwoLayers
from onbeat.training.model.vision import Layer as VisionLayer
from onbeat.training.model.vision import VisionTower

# B batch, V views, S image side, N prefix tokens, D draws (noise and time) per prefix, C chunk rows, A = 200 slots,
# E width of the action stream.

Cache = list[KeysValues]
Refine = Callable[[Tensor], Tensor]

INITIAL_DEVIATION = 0.02
INITIAL_LAYER_SCALE = 0.1


class Policy(nn.Module):
    """Being-H0.5. mpg is None where the checkpoint has no gate."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.gen.width
        self.vit_model = VisionTower(config.vision)
        self.connector = Connector(config)
        self.language_model = Decoder(config.decoder)
        self.state_encoder = TwoLayers(UNIFIED, width, width)
        self.action_encoder = ActionEncoder(width)
        self.action_decoder = TwoLayers(width, width, UNIFIED)
        self.mpg = ManifoldGate(config.decoder) if config.gate.present else None

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Normalised views (B, V, 3, S, S) to image tokens (B, V x tokens_per_view, und width)."""
        tokens = self.connector(self.vit_model(pixel_values.flatten(0, 1)))
        return tokens.unflatten(0, pixel_values.shape[:2]).flatten(1, 2)

    def embed_prefix(self, image_tokens: Tensor, token_ids: Tensor, image_start: int, state_index: int) -> Tensor:
        """Und tokens in order, without the state token: (B, N - 1, und width).

        token_ids: (B, N), anything where the image tokens and the state token stand. The images precede the state.
        """
        after = image_start + image_tokens.shape[1]
        assert after <= state_index, f"image tokens end at {after}, after the state token at {state_index}"
        embed = self.language_model.embed_tokens
        pieces = [
            embed(token_ids[:, :image_start]),
            image_tokens,
            embed(token_ids[:, after:state_index]),
            embed(token_ids[:, state_index + 1 :]),
        ]
        return torch.cat(pieces, dim=1)

    def encode_prefix(
        self, pixel_values: Tensor, token_ids: Tensor, image_start: int, state_index: int, state: Tensor
    ) -> Cache:
        """All that precedes the actions, once: per layer keys and values (B, kv_heads, N, head_dim).

        pixel_values (B, V, 3, S, S) normalised, token_ids (B, N), state (B, A) normalised and unified.
        """
        und = self.embed_prefix(self.encode_views(pixel_values), token_ids, image_start, state_index)
        return self.language_model.encode_prefix(und, self.state_encoder(state).unsqueeze(1), state_index)

    def velocity(self, cache: Cache, actions: Tensor, bucket: Tensor, refine: Refine | None = None) -> Tensor:
        """Velocity (B, D, C, A) of noisy actions (B, D, C, A) at time buckets (B, D, C).

        refine: what the gate does to the action features (B, D, C, E) before the decoder sees them.
        """
        features = self.action_encoder(actions, bucket)
        return self.decode_velocity(cache, features if refine is None else refine(features))

    def decode_velocity(self, cache: Cache, features: Tensor) -> Tensor:
        """Action features (B, D, C, E) to velocities (B, D, C, A)."""
        return self.action_decoder(self.language_model.advance(features, cache))


def create_policy(config: PolicyConfig, seed: int) -> Policy:
    """A policy with random weights, ready to be trained: nothing starts at zero that would block a gradient."""
    policy = Policy(config)
    initialise(policy, torch.Generator().manual_seed(seed))
    return policy


def initialise(policy: Policy, generator: torch.Generator) -> None:
    """Truncated normal weights, zero biases, norms at 1, LayerScale small; position embeddings random too."""
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _fill(module.weight, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _fill(module.weight, generator)
        elif isinstance(module, nn.LayerNorm | RmsNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, VisionLayer):
            nn.init.constant_(module.ls1, INITIAL_LAYER_SCALE)
            nn.init.constant_(module.ls2, INITIAL_LAYER_SCALE)
    _fill(policy.vit_model.embeddings.class_embedding, generator)
    _fill(policy.vit_model.embeddings.position_embedding, generator)


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    bound = 2 * INITIAL_DEVIATION
    nn.init.trunc_normal_(weight, std=INITIAL_DEVIATION, a=-bound, b=bound, generator=generator)


def count_parameters(policy: Policy) -> dict[str, int]:
    """Parameters by part, and in "total". lm_head counts though no action ever needs it."""
    decoder = policy.language_model
    parts: dict[str, nn.Module | None] = {
        "vision": policy.vit_model,
        "connector": policy.connector,
        "embedding": decoder.embed_tokens,
        "und": nn.ModuleList([*(layer.und for layer in decoder.stack), decoder.norm["und"]]),
        "gen": nn.ModuleList([*(layer.gen for layer in decoder.stack), decoder.norm["gen"]]),
        "lm_head": decoder.lm_head,
        "heads": nn.ModuleList([policy.state_encoder, policy.action_encoder, policy.action_decoder]),
        "gate": policy.mpg,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) if part else 0 for name, part in parts.items()}
    return {**counts, "total": sum(counts.values())}
