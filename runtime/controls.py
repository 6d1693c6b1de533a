"""A bundle whose weights mean nothing: same graphs, same tokenizer, every weight matrix shuffled."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.bundle import MANIFEST_FILE, SEAL_FILE, hash_file, load_bundle, write_manifest


class NoGraphReader(OnbeatError):
    """The package that reads ONNX files is not installed."""


class Stretch(NamedTuple):
    """Where a float32 array lies in its file, bytes."""

    file: str
    offset: int
    length: int


def redraw_weights(bundle: Path, out: Path, *, seed: int) -> Path:
    """Copy `bundle` to `out` with the numbers of every weight array in another order; returns `out`.

    So each array keeps its distribution and loses its meaning. Arrays small enough to lie in the graph itself
    (narrow biases, gains of norms) stay. Raises BundleError, NoGraphReader.
    """
    manifest = load_bundle(bundle).manifest
    shutil.copytree(bundle, out, ignore=shutil.ignore_patterns(".*"))
    stretches = {s for record in manifest.graphs.values() for s in external_floats(out / record.file)}
    assert stretches, f"{bundle} keeps no weights outside its graphs"
    rng = np.random.default_rng(seed)
    for stretch in sorted(stretches):
        array = np.memmap(out / stretch.file, np.float32, "r+", stretch.offset, (stretch.length // 4,))
        array[:] = rng.permutation(array)
        array.flush()
    files = {name: hash_file(out / name) for name in manifest.files}
    for stale in (MANIFEST_FILE, SEAL_FILE):
        (out / stale).unlink()
    write_manifest(replace(manifest, files=files), out)
    return out


def external_floats(graph: Path) -> Iterator[Stretch]:
    """The float32 arrays that a graph keeps in another file. Raises NoGraphReader."""
    try:
        import onnx
    except ImportError:
        raise NoGraphReader(
            "random weights need the ONNX package: run `pip install 'onbeat[export]'`, or choose another control"
        ) from None
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            yield Stretch(place["location"], int(place["offset"]), int(place["length"]))
