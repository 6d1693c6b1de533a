"""What the rounding of an inference depends on: where all of it is the same, a replay has to give the same bits.

Measured in docs/decisions/0026-replay.md: the same graphs, build, number of threads and instruction sets give the same
bits in every run and process; another set of graph optimisations does not.
"""

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

CPU_INFO: Final = Path("/proc/cpuinfo")
_SETS: Final = ("avx", "fma", "amx", "asimd", "sve", "bf16", "fp16", "i8mm", "fphp")  # that kernels are chosen by


def backend(*, threads: int, cpu_info: Path = CPU_INFO) -> dict[str, str | int]:
    """Of this machine and installation. threads: of each session."""
    return {
        "engine": f"onnxruntime {importlib.metadata.version('onnxruntime')}, CPU",
        "threads": threads,
        "numpy": importlib.metadata.version("numpy"),
        "machine": platform.machine(),
        "instruction_sets": " ".join(instruction_sets(cpu_info)),
    }


def instruction_sets(cpu_info: Path = CPU_INFO) -> list[str]:
    """The processor's instruction sets that matter for arithmetic on arrays; empty where the system does not tell."""
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    names = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(name for name in names if name.startswith(_SETS))


def backend_changes(recorded: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """What is not the same, in words; empty when a replay has to be exact."""
    return [f"{name}: {recorded.get(name)} -> {here.get(name)}" for name in _names(recorded, here)]


def _names(recorded: Mapping[str, object], here: Mapping[str, object]) -> Iterable[str]:
    return [name for name in here if recorded.get(name) != here[name]]
