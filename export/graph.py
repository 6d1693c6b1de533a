"""An ONNX graph under construction, and the file of weights that several graphs share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) reads; has Gelu and LayerNormalization
IR_VERSION = 9
PAGE = 4096  # weights start on a page, so that a runtime can map them instead of copying
INLINE_BYTES = 1024  # smaller ones stay in the graph
END = 2**31  # for Slice: to the end of the axis

Shape = Sequence[int | str]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an array lies in the weight file, in bytes."""

    offset: int
    length: int


class WeightFile:
    """Appends arrays to one file; a name is stored once, whichever graphs use it."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file: BinaryIO = path.open("wb")
        self._placed: dict[str, Placement] = {}

    def place(self, name: str, array: NDArray) -> Placement:
        """Store `array` (little-endian, C order) under `name`, or return where that name already lies."""
        placed = self._placed.get(name)
        if placed is not None:
            assert placed.length == array.nbytes, (name, placed, array.shape)
            return placed
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        placed = self._placed[name] = Placement(self._file.tell(), array.nbytes)
        self._file.write(np.ascontiguousarray(array).data)
        return placed

    def close(self) -> None:
        self._file.close()


class Graph:
    """Collects nodes; every value is a string, every node carries the path of the scopes it was made in.

    parameters: the checkpoint's, by published name; only those that some node uses are stored.
    """

    def __init__(self, name: str, parameters: Mapping[str, NDArray[np.float32]], file: WeightFile) -> None:
        self.name = name
        self.parameters = parameters
        self._file = file
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scopes: list[str] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of what is made inside: `layer_03/...`."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declare an input; a string in `shape` is a dynamic dimension."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: type[np.generic], shape: Shape) -> None:
        """Publish `value` under `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self._outputs.append(_value_info(name, dtype, shape))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output and return that value."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: object) -> list[str]:
        """Add a node with several outputs."""
        path = "/".join([*self._scopes, f"{kind}_{len(self._nodes)}"])
        names = [path] if outputs == 1 else [f"{path}:{k}" for k in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, name=path)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self._nodes.append(node)
        return names

    def parameter(self, name: str) -> str:
        """One of the checkpoint's parameters, stored as it is."""
        return self.weight(name, self.parameters[name])

    def weight(self, name: str, array: NDArray | Callable[[], NDArray]) -> str:
        """A named constant in the shared weight file, or in the graph when it is tiny. One name, one array.

        A function instead of an array is called on first use only: for arrays that are computed.
        """
        if name not in self._initializers:
            self._initializers[name] = self._tensor(name, array() if callable(array) else array)
        return name

    def floats(self, values: object) -> str:
        """A small float32 constant, shared by value."""
        return self._literal(np.asarray(values, np.float32))

    def ints(self, values: object) -> str:
        """A small int64 constant, shared by value."""
        return self._literal(np.asarray(values, np.int64))

    def model(self) -> onnx.ModelProto:
        """The finished model, checked by ONNX's own rules."""
        initializers = list(self._initializers.values())
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onbeat")

    def _literal(self, array: NDArray) -> str:
        text = ",".join(str(v) for v in array.ravel().tolist())
        return self.weight(f"const/{array.dtype}{list(array.shape)}={text}", array)

    def _tensor(self, name: str, array: NDArray) -> onnx.TensorProto:
        if array.nbytes < INLINE_BYTES:
            return numpy_helper.from_array(np.asarray(array, order="C"), name)
        return self._external(name, array)

    def _external(self, name: str, array: NDArray) -> onnx.TensorProto:
        placed = self._file.place(name, array)
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._file.name), ("offset", placed.offset), ("length", placed.length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _value_info(name: str, dtype: type[np.generic], shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
