"""The bundle: a folder with everything a robot needs of a policy, and a manifest that says what it is.

- the network: prefix.onnx, flow.onnx, weights.bin
- its language (see runtime/language.py): language.json, embodiment.toml, tokenizer.json, <dataset>_metadata.json
- manifest.json: shapes, versions, sampler, measured differences, sha256 of every file
- manifest.sha256: sha256 of the manifest, as `sha256sum -c` reads it
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.robot import Embodiment
from onbeat.runtime.engine import ExpertsSpec, PolicySpec, SamplerSpec
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.onnx_engine import OnnxEngine

FORMAT = "onbeat bundle"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SEAL_FILE = "manifest.sha256"
HASH_BLOCK = 1 << 20


class BundleError(OnbeatError):
    """A bundle that cannot be used."""


class NotABundle(BundleError):
    """The folder does not exist or holds no manifest."""


class UnknownBundleVersion(BundleError):
    """The bundle was written by another generation of this program."""


class DamagedBundle(BundleError):
    """A file is missing, changed, or not of the bundle."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where a bundle came from. sha256: see export/digest.py."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class GraphRecord:
    """One ONNX file. inputs, outputs: name -> [dtype, dimensions], a string for the dynamic one."""

    file: str
    opset: int
    ir_version: int
    inputs: Mapping[str, list[Any]]
    outputs: Mapping[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Proof:
    """Largest differences from the PyTorch network on `draws` random inputs, divided by max(1, largest value)."""

    draws: int
    seed: int
    tolerance: float
    prefix: float
    flow: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself. rope: "bf16" or "fp32". files: name -> sha256, all but manifest and seal."""

    embodiment: str
    checkpoint: CheckpointSource
    rope: str
    policy: PolicySpec
    image_start: int
    state_index: int
    graphs: Mapping[str, GraphRecord]
    proof: Proof
    made_with: Mapping[str, str]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Manifest":
        """The inverse of `to_json`. Raises KeyError or TypeError for a field too many or too few."""
        fields = {key: value for key, value in document.items() if key not in ("format", "version")}
        sampler = SamplerSpec(**fields["policy"]["sampler"])
        experts = fields["policy"].get("experts")
        nested = {"sampler": sampler, "experts": None if experts is None else ExpertsSpec(**experts)}
        parsed = {
            "checkpoint": CheckpointSource(**fields["checkpoint"]),
            "policy": PolicySpec(**{**fields["policy"], **nested}),
            "graphs": {name: GraphRecord(**record) for name, record in fields["graphs"].items()},
            "proof": Proof(**fields["proof"]),
        }
        return cls(**{**fields, **parsed})


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose every file was found as its manifest says."""

    folder: Path
    manifest: Manifest

    def open_engine(self, *, threads: int = 1) -> OnnxEngine:
        """The network, ready to run. threads: of each session."""
        manifest = self.manifest
        prefix, flow = (self.folder / manifest.graphs[name].file for name in ("prefix", "flow"))
        return OnnxEngine(
            prefix,
            flow,
            manifest.policy,
            image_start=manifest.image_start,
            state_index=manifest.state_index,
            threads=threads,
        )

    def open_language(self, embodiment: str | Path | Embodiment | None = None) -> PolicyLanguage:
        """The translation to its robot. Raises WrongEmbodiment when `embodiment` is given and is another robot."""
        return PolicyLanguage.from_folder(self.folder, embodiment=embodiment)


def load_bundle(folder: str | Path) -> Bundle:
    """Read the manifest and check every byte of every file. Raises NotABundle, UnknownBundleVersion, DamagedBundle."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_listing(folder, manifest)
    for name, expected in manifest.files.items():
        if hash_file(folder / name) != expected:
            raise DamagedBundle(f"{folder / name} was changed since the export: copy or export the bundle again")
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against its seal. Raises as `load_bundle`."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise NotABundle(f"{folder} holds no {MANIFEST_FILE}: give a folder made by `onbeat export`")
    content = path.read_bytes()
    try:
        document = json.loads(content)
        _check_version(folder, document)
        _check_seal(folder, content)
        return Manifest.from_json(document)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DamagedBundle(f"{path} cannot be read ({problem!r}): copy or export the bundle again") from None


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest and its seal."""
    content = (json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST_FILE).write_bytes(content)
    (folder / SEAL_FILE).write_text(_seal(content), encoding="ascii")


def hash_file(path: Path) -> str:
    """sha256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_version(folder: Path, document: Mapping[str, Any]) -> None:
    found = document.get("format"), document.get("version")
    if found != (FORMAT, VERSION):
        raise UnknownBundleVersion(
            f"{folder} is '{found[0]}' version {found[1]}, this is for '{FORMAT}' version {VERSION}: "
            "export the checkpoint again with this version"
        )


def _check_seal(folder: Path, content: bytes) -> None:
    path = folder / SEAL_FILE
    if not path.is_file():
        raise DamagedBundle(f"{path} is missing: copy or export the bundle again")
    if path.read_bytes() != _seal(content).encode():
        raise DamagedBundle(f"{folder / MANIFEST_FILE} was changed since the export: copy or export the bundle again")


def _seal(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n"


def _check_listing(folder: Path, manifest: Manifest) -> None:
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    expected = {*manifest.files, MANIFEST_FILE, SEAL_FILE}
    if missing := sorted(expected - found):
        raise DamagedBundle(f"{folder} lacks {', '.join(missing)}: copy or export the bundle again")
    if extra := sorted(found - expected):
        raise DamagedBundle(f"{folder} holds {', '.join(extra)}, which the manifest does not name: remove it")
