"""What a training step costs for the sizes that decision 0011 weighs: processor time per step of one thread.

python -m onbeat.training.demonstrations --episodes 12 --seed 1000 --out out/a_few
python docs/decisions/0011_first_policy.py --data out/a_few
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from onbeat.training.prepare import Prepared, prepare, start_fit
from onbeat.training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parents[2] / "training" / "configs" / "so101_lift.toml"
PATCH_14 = {"patch_size": 14, "vision_width": 128, "vision_ffn": 384, "vision_heads": 4}
VARIANTS = {
    "as shipped": ({}, {}),
    "8 draws per observation": ({}, {"draws": 8}),
    "2 draws per observation": ({}, {"draws": 2}),
    "patches of 14, width 128": (PATCH_14, {}),
    "patches of 14, width 128, 8 draws": (PATCH_14, {"draws": 8}),
}


def measure_step(recipe: Recipe, prepared: Prepared, steps: int) -> float:
    """Processor seconds per step, after one that warms up."""
    fit = start_fit(recipe, prepared)
    fit.advance()
    began_s = time.process_time()
    for _ in range(steps):
        fit.advance()
    return (time.process_time() - began_s) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a few demonstrations are enough")
    parser.add_argument("--steps", type=int, default=10, help="steps per variant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shipped = load_recipe(RECIPE)
    for name, (network, fitting) in VARIANTS.items():
        recipe = replace(
            shipped, network=replace(shipped.network, **network), fitting=replace(shipped.fitting, **fitting)
        )
        with tempfile.TemporaryDirectory() as scratch:
            prepared = prepare(recipe, options.data, Path(scratch))
        cost_s = measure_step(recipe, prepared, options.steps)
        print(f"{name:36} {cost_s:5.2f} s/step  {recipe.fitting.batch / cost_s:4.0f} observations/s")


if __name__ == "__main__":
    main()
