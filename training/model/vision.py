"""InternViT: images to patch features, and the pixel shuffle that folds a square of patches into one token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onbeat.training.config import VisionConfig

# B batch, V views, S image side in pixels, P patches per view, W width of the tower.

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB
IMAGE_STD = (0.229, 0.224, 0.225)


def normalise_views(views: Tensor) -> Tensor:
    """(..., S, S, 3) uint8 RGB to (..., 3, S, S) float32, ImageNet mean 0 and deviation 1."""
    mean, std = (torch.tensor(values, device=views.device) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((views.float() / 255.0 - mean) / std).movedim(-1, -3)


class Embeddings(nn.Module):
    """Patches to vectors, a class token in front, learned positions on all."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, 1 + P, W)."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(images.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class Attention(nn.Module):
    """Plain multi-head attention of every patch to every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, W) to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear maps with the erf GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each scaled per channel (LayerScale) before it is added."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.ls1 = nn.Parameter(torch.ones(config.width))
        self.ls2 = nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class Encoder(nn.Module):
    """The stack; layers above the selected hidden state are kept for writing back but never run."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.depth = config.depth
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.depth]:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """Images to one vector per square of patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised images to (B, tokens_per_view, shuffle^2 x W)."""
        patches = self.encoder(self.embeddings(images))[:, 1:]
        return shuffle_pixels(patches, self.config.grid, self.config.shuffle)


def shuffle_pixels(patches: Tensor, grid: int, side: int) -> Tensor:
    """(B, grid^2, W) to (B, (grid / side)^2, side^2 x W): each square of patches, row by row, becomes one token."""
    cells = patches.unflatten(1, (grid // side, side, grid // side, side))
    return cells.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
