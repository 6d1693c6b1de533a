"""The policy on ONNX Runtime: two sessions on one set of buffers, so that the cache never moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.runtime.engine import FlowResult, Guidance, PolicyInputs, PolicySpec, check_guidance

# The letters of runtime/engine.py: V, S, N, C, I, T, M, H.

DTYPES = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(float)": np.float32}
TOKENS = "tokens"  # the one dynamic dimension

Arrays = dict[str, NDArray[Any]]


class InputError(OnbeatError):
    """An array that does not fit the policy it is given to."""


@dataclass(frozen=True, slots=True)
class CacheHandle:
    """One observation's keys and values by name, (k, N, d) each, the state's row last. The next prefix reuses them."""

    arrays: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class BoundSession:
    """A session and the arrays it reads and writes in place."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    inputs: Arrays
    outputs: Arrays

    def run(self) -> None:
        """One pass over the arrays."""
        self.session.run_with_iobinding(self.binding)


class OnnxEngine:
    """Implements `onbeat.runtime.engine.Engine`. Not thread-safe: one thread owns it.

    Buffers are made once per prefix length, that is once per instruction; after that a pass allocates nothing but its
    result.
    """

    def __init__(
        self, prefix: Path, flow: Path, spec: PolicySpec, *, image_start: int, state_index: int, threads: int = 1
    ) -> None:
        """Open both graphs. threads: of each session; the two never run at once."""
        self.spec = spec
        self._layout = (image_start, state_index)
        self._sessions = (open_session(prefix, threads), open_session(flow, threads))
        self._bound: tuple[BoundSession, BoundSession] | None = None
        self._handle: CacheHandle | None = None

    def prefix(self, inputs: PolicyInputs) -> CacheHandle:
        """Run vision and prefix. Raises InputError for inputs of another shape than the policy's."""
        self._check_layout(inputs)
        prefix, _ = self._bind(len(inputs.token_ids))
        for name, array in (("views", inputs.views), ("token_ids", inputs.token_ids), ("state", inputs.state)):
            fill(prefix.inputs, name, array)
        self._handle = None
        prefix.run()
        self._handle = CacheHandle(prefix.outputs)
        return self._handle

    def flow(
        self,
        prefix: CacheHandle,
        noise: NDArray[np.float32],
        *,
        directions: NDArray[np.float32] | None = None,
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> FlowResult:
        """Sample one chunk; the arrays are those of `Engine.flow`. Raises InputError."""
        if self._bound is None or prefix is not self._handle:
            raise InputError("this prefix was overwritten by a later one: run the flow before the next prefix")
        flow = self._bound[1]
        flow.inputs["delay"][...] = check_delay(delay, prev_chunk, self.spec.chunk)
        fill(flow.inputs, "noise", noise)
        if "directions" in flow.inputs:
            fill(flow.inputs, "directions", _given(directions))
        fill_guidance(flow.inputs, guidance, prev_chunk, self.spec)
        if prev_chunk is not None:
            fill(flow.inputs, "prev_chunk", fit_chunk(prev_chunk, self.spec.chunk))
        flow.run()
        return _result(flow.outputs)

    def _check_layout(self, inputs: PolicyInputs) -> None:
        if (inputs.image_start, inputs.state_index) != self._layout:
            raise InputError(
                f"images start at token {inputs.image_start} and the state is token {inputs.state_index}, "
                f"the graphs were made for {self._layout}: export the bundle again"
            )
        if inputs.token_ids.ndim != 1 or len(inputs.token_ids) <= inputs.state_index:
            raise InputError(f"token_ids has shape {inputs.token_ids.shape}: give the whole prefix, state included")

    def _bind(self, tokens: int) -> tuple[BoundSession, BoundSession]:
        """Sessions bound to buffers for `tokens` prefix tokens; the prefix's outputs are the flow's inputs."""
        if self._bound is None or len(self._bound[0].inputs["token_ids"]) != tokens:
            prefix = bind_session(self._sessions[0], {}, tokens)
            self._bound = (prefix, bind_session(self._sessions[1], prefix.outputs, tokens))
        return self._bound


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """A CPU session whose idle threads sleep: spinning ones would steal the control loop's time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bind_session(session: ort.InferenceSession, shared: Arrays, tokens: int) -> BoundSession:
    """Bind every input and output to an array: one of `shared` where the name is there, else a new one of zeros."""
    binding = session.io_binding()
    inputs = {node.name: shared.get(node.name, _zeros(node, tokens)) for node in session.get_inputs()}
    outputs = {node.name: _zeros(node, tokens) for node in session.get_outputs()}
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
    return BoundSession(session, binding, inputs, outputs)


def fill(into: Arrays, name: str, array: NDArray[Any]) -> None:
    """Copy `array` into the buffer `name`. Raises InputError for another shape or type, and for what is not finite."""
    buffer = into[name]
    if array.shape != buffer.shape or not np.can_cast(array.dtype, buffer.dtype, "same_kind"):
        raise InputError(
            f"{name} is {array.dtype} {array.shape}, this policy takes {buffer.dtype} {buffer.shape}: give that"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite: check where it comes from")
    np.copyto(buffer, array, casting="same_kind")


def check_delay(delay: int, prev_chunk: NDArray[np.float32] | None, chunk: int) -> int:
    """`delay` if those rows can be kept. Raises InputError."""
    if not 0 <= delay <= chunk:
        raise InputError(f"a delay of {delay} rows does not fit a chunk of {chunk}: give 0 to {chunk}")
    if delay and prev_chunk is None:
        raise InputError(f"a delay of {delay} rows without a previous chunk: give prev_chunk")
    return delay


def fill_guidance(
    inputs: Arrays, guidance: Guidance | None, prev_chunk: NDArray[np.float32] | None, spec: PolicySpec
) -> None:
    """Write the guidance into the flow's inputs, or that there is none. Raises GuidanceError."""
    if guidance is not None:
        check_guidance(guidance, prev_chunk, spec)
        fill(inputs, "guidance_weights", guidance.weights)
    if spec.guidance:
        inputs["guidance_beta"][...] = 0.0 if guidance is None else guidance.beta


def fit_chunk(prev_chunk: NDArray[np.float32], chunk: int) -> NDArray[np.float32]:
    """(R, 200) -> (C, 200): cut, or padded by its last row. Raises InputError."""
    if prev_chunk.ndim != 2 or len(prev_chunk) == 0 or prev_chunk.shape[1] != UNIFIED_DIM:
        raise InputError(f"prev_chunk has shape {prev_chunk.shape}: give one or more rows of {UNIFIED_DIM} numbers")
    return prev_chunk[np.minimum(np.arange(chunk), len(prev_chunk) - 1)]


def _given(directions: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if directions is None:
        raise InputError("this policy's gate takes directions: give them, or export with the expectation gate")
    return directions


def _zeros(node: ort.NodeArg, tokens: int) -> NDArray[Any]:
    return np.zeros([tokens if size == TOKENS else size for size in node.shape], DTYPES[node.type])


def _result(outputs: Arrays) -> FlowResult:
    none = np.zeros((0, 0), np.float32)
    gate, cost = (outputs[name].copy() if name in outputs else none for name in ("gate", "cost"))
    return FlowResult(outputs["actions"].copy(), gate, cost)
