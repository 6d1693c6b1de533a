"""Sequences of different lengths in one pass, without padding: a product runs over all tokens, attention by group.

A group is what has one shape: B sequences of N tokens, positions from 0 in each. Groups lie one after the other in one
row of tokens, so that each is a view of it. A group alone stays as it is: packing costs it nothing.
Other ways were slower: docs/decisions/0032-scale.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, int]  # (B, N)


def join(groups: Sequence[Tensor]) -> Tensor:
    """Groups (B, N, ...) to one row of tokens (1, sum of B x N, ...); a group alone stays (B, N, ...)."""
    if len(groups) == 1:
        return groups[0]
    return torch.cat([group.flatten(0, 1) for group in groups]).unsqueeze(0)


def split(tokens: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The way back: views (B, N, ...)."""
    if len(shapes) == 1:
        return [tokens]
    parts = tokens.squeeze(0).split([batch * length for batch, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def stack(groups: Sequence[Tensor]) -> Tensor:
    """Groups (B, ...) that differ in B alone to (sum of B, ...)."""
    return groups[0] if len(groups) == 1 else torch.cat(list(groups))


def unstack(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The way back: views (B, ...)."""
    return [rows] if len(sizes) == 1 else list(rows.split(list(sizes)))
