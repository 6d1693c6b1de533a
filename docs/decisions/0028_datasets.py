"""Figures of 0028: how fast samples come from a dataset, by threads, beside the same frames in memory.

python docs/decisions/0028_datasets.py out/demonstrations --samples 400
"""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.language import LanguageSettings, PolicyLanguage
from onbeat.runtime.prompt import load_tokenizer
from onbeat.training.data.columns import read_columns
from onbeat.training.data.reader import open_dataset
from onbeat.training.data.robot_data import RobotData
from onbeat.training.data.sample import Sample
from onbeat.training.data.sources import RobotSource
from onbeat.training.data.statistics import measure_data

TOKENIZER = Path(__file__).parents[2] / "checkpoints/so101-lift"


def open_source(folder: Path, *, in_memory: bool) -> RobotSource:
    """The twin's demonstrations as the shipped policy reads them."""
    robot, dataset = load_embodiment("so101"), open_dataset(folder)
    data = RobotData(dataset, robot, read_columns({}, robot, robot.views, dataset.info.features, str(folder)))
    began = time.perf_counter()
    statistics = measure_data("so101", [data], 16).merged
    if not in_memory:
        rate = len(dataset) / (time.perf_counter() - began)
        print(f"statistics of {len(dataset)} rows: {rate:,.0f} rows/s")
    settings = LanguageSettings("so101", robot.views, 112, 4, 16, "You move a robot arm.", "{task_description}")
    language = PolicyLanguage(settings, robot, load_tokenizer(TOKENIZER), statistics)
    return RobotSource(data, language, kind="simulation", holds_at_end=True, in_memory=in_memory)


def rate(read: Callable[[int], Sample], order: Sequence[int], threads: int) -> float:
    """Samples per second, read in that order."""
    began = time.perf_counter()
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, order))
    else:
        for index in order:
            read(index)
    return len(order) / (time.perf_counter() - began)


def main() -> None:
    """Print one line per way of reading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    options = parser.parse_args()
    rng, source = np.random.default_rng(0), open_source(options.folder, in_memory=False)
    order = rng.permutation(len(source))[: options.samples].tolist()
    for name, indices in (("random", order), ("in order", list(range(options.samples)))):
        for threads in (0, 1, 2):
            print(
                f"{name:9} {threads} threads  {rate(lambda i: source.sample(i, rng), indices, threads):8,.0f} samples/s"
            )
    kept = open_source(options.folder, in_memory=True)
    print(f"in memory 0 threads  {rate(lambda i: kept.sample(i, rng), order, 0):8,.0f} samples/s")


if __name__ == "__main__":
    main()
