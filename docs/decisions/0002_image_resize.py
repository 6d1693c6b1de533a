"""The figures of decision 0002: what other resizes do to pixels and actions, and what ours costs.

Run from the repository root: python docs/decisions/0002_image_resize.py
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from onbeat.kernels.image import crop_start, resize_and_crop, scaled_shape
from onbeat.runtime import language
from onbeat.runtime.cases import case_language, load_cases, replay_case
from onbeat.training.torch_engine import open_engine

CASES = Path("tests/golden")
Image = NDArray[np.uint8]
Resize = Callable[[Image, int], Image]


def tensor_resize(mode: str, *, antialias: bool, dtype: torch.dtype) -> Resize:
    """PyTorch's resize with our sizes and our crop."""

    def resize(rgb: Image, size: int) -> Image:
        shape = scaled_shape(*rgb.shape[:2], size)
        planes = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].to(dtype)
        scaled = interpolate(planes, shape, mode=mode, antialias=antialias, align_corners=False)
        pixels = scaled.clamp(0, 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
        top, left = (crop_start(extent, size) for extent in shape)
        return pixels[top : top + size, left : left + size].copy()

    return resize


def off_by_one_row(rgb: Image, size: int) -> Image:
    rows = resize_and_crop(rgb, size)
    return np.concatenate([rows[1:], rows[-1:]])


VARIANTS: dict[str, Resize] = {
    "Pillow bicubic (ours)": resize_and_crop,
    "PyTorch bicubic, antialias, uint8": tensor_resize("bicubic", antialias=True, dtype=torch.uint8),
    "PyTorch bicubic, antialias, float32": tensor_resize("bicubic", antialias=True, dtype=torch.float32),
    "PyTorch bilinear, antialias, float32": tensor_resize("bilinear", antialias=True, dtype=torch.float32),
    "PyTorch bicubic, no antialias, float32": tensor_resize("bicubic", antialias=False, dtype=torch.float32),
    "ours, crop off by one row": off_by_one_row,
}


def worst_pixel(resize: Resize, images: list[Image]) -> int:
    return max(int(np.abs(resize(i, 56).astype(int) - resize_and_crop(i, 56)).max()) for i in images)


def worst_action(resize: Resize) -> float:
    """Largest difference from the recorded actions over all cases, with that resize in the policy's language."""
    language.resize_and_crop = resize  # type: ignore[assignment]
    worst = 0.0
    for case in load_cases(CASES):
        options: dict[str, Any] = {"overrides": case.overrides, "directions": case.directions is not None}
        folder = CASES / case.checkpoint
        engine = open_engine(folder, views=len(case.views), rope="fp32", enable_rtc=case.enable_rtc, **options)
        worst = max(worst, replay_case(case, engine, case_language(folder, case)).actions)
    return worst


def time_ms(height: int, width: int, size: int, count: int = 300) -> tuple[float, float]:
    """p50 and p99 of one image of noise, after 20 calls to warm up."""
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    taken = []
    for _ in range(20 + count):
        started = time.perf_counter()
        resize_and_crop(rgb, size)
        taken.append((time.perf_counter() - started) * 1e3)
    return float(np.percentile(taken[20:], 50)), float(np.percentile(taken[20:], 99))


def main() -> None:
    torch.set_num_threads(1)
    stored = np.load(CASES / "unit_images.npz")
    images = [stored[name] for name in stored.files if name.endswith("/in")]
    print("| resize | largest pixel difference (of 255) | largest action difference |\n|---|---|---|")
    for name, resize in VARIANTS.items():
        print(f"| {name} | {worst_pixel(resize, images)} | {worst_action(resize):.1e} |")
    print("\n| camera | to | p50 ms | p99 ms |\n|---|---|---|---|")
    for height, width, size in ((224, 224, 224), (224, 224, 96), (256, 256, 224), (480, 640, 224), (720, 1280, 224)):
        p50, p99 = time_ms(height, width, size)
        print(f"| {width} x {height} | {size} | {p50:.2f} | {p99:.2f} |")


if __name__ == "__main__":
    main()
