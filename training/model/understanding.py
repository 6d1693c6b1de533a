"""What the understanding stream says: the tokens after a prefix, for samples that ask it a question in words."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from onbeat.training.model.packing import join, split, stack
from onbeat.training.model.policy import Policy, Prefix

# B observations of a group, N prefix tokens, T answer tokens, H width of the understanding stream, W vocabulary.


def answer_logits(policy: Policy, prefixes: Sequence[Prefix], answers: Sequence[Tensor]) -> list[Tensor]:
    """Logits (B, T, W) of each group's answer tokens, given the prefix and the answer tokens before.

    answers: (B, T) each, T >= 1, any token as padding.
    """
    groups = list(zip(prefixes, answers, strict=True))
    said = [prefix._replace(token_ids=torch.cat([prefix.token_ids, answer[:, :-1]], 1)) for prefix, answer in groups]
    decoder = policy.language_model
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    hidden = zip(_understand(policy, said), answers, strict=True)
    return [F.linear(tokens[:, -answer.shape[1] :], head.weight) for tokens, answer in hidden]


def _understand(policy: Policy, prefixes: Sequence[Prefix]) -> list[Tensor]:
    """Every layer, the last one whole, and the final norm: (B, N - 1, H), without the state's token."""
    decoder = policy.language_model
    images = policy.encode_images([prefix.pixel_values for prefix in prefixes])
    und = [policy.embed_prefix(views, *prefix[1:4]) for views, prefix in zip(images, prefixes, strict=True)]
    states = policy.state_encoder(stack([prefix.state for prefix in prefixes])).unsqueeze(1)
    places = [decoder.place(group, prefix.state_index) for group, prefix in zip(und, prefixes, strict=True)]
    tokens = join(und)
    for layer in decoder.stack:
        tokens, states, _ = layer(tokens, states, places)
    return split(decoder.norm["und"](tokens), [place.shape for place in places])
