"""Figures of decision 0005: a flow graph from torch.onnx.export beside the one written node by node.

OMP_NUM_THREADS=1 python docs/decisions/0005_two_graphs.py     (a minute of CPU; needs the export extra)
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from onbeat.export.graphs import FLOW_FILE, write_graphs
from onbeat.export.prefix_graph import PrefixLayout
from onbeat.runtime.cases import load_cases
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.model.decoder import KeysValues
from onbeat.training.model.policy import Policy
from onbeat.training.model.sampler import choose_sampler, sample_chunk

CASES = Path(__file__).parents[2] / "tests" / "golden"
OPSET = 20
TOKENS = 110
RUNS = 150


class Flow(nn.Module):
    """The sampler as a module that torch.onnx.export can trace."""

    def __init__(self, policy: Policy, overrides: dict) -> None:
        super().__init__()
        self.policy = policy
        self.spec = choose_sampler(policy.config, overrides, directions=True)

    def forward(self, keys: list[Tensor], values: list[Tensor], noise: Tensor, directions: Tensor) -> Tensor:
        cache = [KeysValues(*pair) for pair in zip(keys, values, strict=True)]
        return sample_chunk(self.policy, cache, self.spec, noise.unsqueeze(1), directions=directions).actions[0]


def trace(flow: Flow, inputs: tuple, path: Path) -> float:
    """Export by tracing; returns CPU seconds."""
    start, tokens = time.process_time(), [{2: torch.export.Dim.AUTO}] * len(inputs[0])
    shapes = (tokens, tokens, None, None)
    program = torch.onnx.export(flow, inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(path)
    return time.process_time() - start


def write(flow: Flow, folder: Path) -> float:
    """Export by writing nodes, both graphs; returns CPU seconds."""
    start = time.process_time()
    write_graphs(flow.policy, PrefixLayout(views=2, image_start=50, state_index=70), flow.spec, folder)
    return time.process_time() - start


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def main() -> None:
    """Export both ways, compare with PyTorch, and time the two in turns."""
    case = load_cases(CASES)[1]
    flow = Flow(load_checkpoint(CASES / case.checkpoint, rope="fp32").eval(), dict(case.overrides)).eval()
    layers = flow.policy.config.decoder.layers
    keys, values = ([torch.randn(1, 2, TOKENS, 16) for _ in range(layers)] for _ in range(2))
    assert case.directions is not None
    inputs = (keys, values, torch.from_numpy(case.noise), torch.from_numpy(case.directions))
    with torch.inference_mode():
        expected = flow(*inputs).numpy()
    arrays = {f"key_{k:02d}": key[0].numpy() for k, key in enumerate(keys)}
    arrays |= {f"value_{k:02d}": value[0].numpy() for k, value in enumerate(values)}
    arrays |= {"noise": case.noise, "directions": case.directions}
    arrays |= {"prev_chunk": np.zeros((16, 200), np.float32), "delay": np.array(0)}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"traced": Path(scratch) / "traced.onnx", "written": Path(scratch) / FLOW_FILE}
        seconds = {"traced": trace(flow, inputs, paths["traced"]), "written": write(flow, Path(scratch))}
        sessions = {name: open_session(path) for name, path in paths.items()}
        names = [node.name for node in sessions["traced"].get_inputs()]
        flat = [x.numpy() for x in (*keys, *values, inputs[2], inputs[3])]
        feeds = {"traced": dict(zip(names, flat, strict=True)), "written": arrays}
        times: dict[str, list[float]] = {"traced": [], "written": []}
        for _ in range(RUNS):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds[name])
                times[name].append(time.perf_counter() - start)
        for name, session in sessions.items():
            difference = np.abs(session.run(None, feeds[name])[0] - expected).max()
            nodes = len(onnx.load(paths[name], load_external_data=False).graph.node)
            low, p10 = (1e3 * np.percentile(times[name], q) for q in (0, 10))
            print(
                f"{name:<8} {seconds[name]:6.2f} CPU s, {nodes} nodes, off {difference:.1e}, {low:.2f} / {p10:.2f} ms"
            )


if __name__ == "__main__":
    main()
