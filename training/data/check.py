"""Look at a LeRobot dataset before a robot learns from it: what is in it, whether all of it can be read; or copy it.

python -m onbeat.training.data.check FOLDER --decode
python -m onbeat.training.data.check FOLDER --copy OTHER --version v3.0
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from onbeat.embodiment.errors import OnbeatError
from onbeat.training.data.layout import INDEX_FEATURES, V30, VERSIONS
from onbeat.training.data.reader import Dataset, check_dataset, open_dataset
from onbeat.training.data.video import ENCODINGS
from onbeat.training.data.writer import DatasetWriter


def describe(dataset: Dataset) -> str:
    """What is in it, as tables for people."""
    info = dataset.info
    head = {
        "version": info.version,
        "robot": info.robot_type or "not said",
        "episodes": f"{len(dataset.episodes):,}",
        "rows": f"{len(dataset):,} at {info.fps:g}/s, {len(dataset) / info.fps / 3600:.2f} h",
    }
    columns = {n: f for n, f in info.features.items() if n not in INDEX_FEATURES}
    lines = [f"{name:12}{value}" for name, value in head.items()]
    lines += ["", f"{'column':40}{'type':10}shape"]
    lines += [f"{name:40}{f.dtype:10}{' x '.join(map(str, f.shape))}" for name, f in columns.items()]
    return "\n".join([*lines, "", *(f"task {number}: {text}" for number, text in sorted(dataset.tasks.items()))])


def copy_dataset(dataset: Dataset, folder: Path, *, version: str = V30, encoding: str = "lossless") -> None:
    """Write it anew, in another version or encoding; frames stay as they decode. Raises DataError.

    Columns of text are left out: the writer takes numbers and cameras.
    """
    info = dataset.info
    features = {n: f for n, f in info.features.items() if n not in INDEX_FEATURES and (f.is_number or f.is_camera)}
    with DatasetWriter(
        folder,
        fps=info.fps,
        features=features,
        robot_type=info.robot_type,
        version=version,
        encoding=encoding,
        about=info.about,
    ) as writer:
        for number, episode in enumerate(dataset.episodes):
            columns = {
                name: dataset.frames(number, name)
                if feature.is_camera
                else dataset.numbers(number, name).reshape(episode.length, *feature.shape)
                for name, feature in features.items()
            }
            writer.add_episode(columns, dataset.told(number), episode.extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Describe, check and perhaps copy a dataset; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m onbeat.training.data.check", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a LeRobot dataset, v2.1 or v3.0")
    parser.add_argument("--decode", action="store_true", help="decode every frame of every camera too")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="write it anew there")
    parser.add_argument("--version", choices=VERSIONS, default=V30, help="of the copy")
    parser.add_argument("--encoding", choices=sorted(ENCODINGS), default="lossless", help="of the copy's videos")
    options = parser.parse_args(argv)
    try:
        dataset = open_dataset(options.folder)
        print(describe(dataset))
        check_dataset(dataset, decode=options.decode)
        if options.copy is not None:
            copy_dataset(dataset, options.copy, version=options.version, encoding=options.encoding)
    except OnbeatError as error:
        print(error, file=sys.stderr)
        return 1
    print("every row can be read" + (" and every frame decoded" if options.decode else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
