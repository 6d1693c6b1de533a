"""What the understanding stream says: the tokens after a prefix, for samples that ask it a question in words."""

import torch
from torch import Tensor
from torch.nn import functional as F

from onbeat.training.model.policy import Policy

# B batch, V views, S image side, N prefix tokens, T answer tokens, A = 200 slots, W vocabulary.


def answer_logits(
    policy: Policy,
    pixel_values: Tensor,
    token_ids: Tensor,
    image_start: int,
    state_index: int,
    state: Tensor,
    answer: Tensor,
) -> Tensor:
    """Logits (B, T, W) of each answer token, given the prefix and the answer tokens before it.

    pixel_values (B, V, 3, S, S) normalised, token_ids (B, N), state (B, A), answer (B, T), any valid token as padding.
    """
    ids = torch.cat([token_ids, answer[:, :-1]], dim=1)
    images = policy.encode_views(pixel_values)
    und = policy.embed_prefix(images, ids, image_start, state_index)
    hidden = _through(policy, und, policy.state_encoder(state).unsqueeze(1), state_index)
    decoder = policy.language_model
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    return F.linear(hidden[:, -answer.shape[1] :], head.weight)


def _through(policy: Policy, und: Tensor, state: Tensor, index: int) -> Tensor:
    """Every layer, the last one whole, and the final norm: (B, tokens without the state, H)."""
    decoder = policy.language_model
    places = [decoder.place(und, index)]
    for layer in decoder.stack:
        und, state, _ = layer(und, state, places)
    return decoder.norm["und"](und)
