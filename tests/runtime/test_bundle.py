"""A bundle is used whole and unchanged, or not at all."""

import json
import shutil
from pathlib import Path

import pytest

from onbeat.runtime.bundle import (
    MANIFEST_FILE,
    SEAL_FILE,
    BundleError,
    DamagedBundle,
    Manifest,
    NotABundle,
    UnknownBundleVersion,
    load_bundle,
    read_manifest,
    write_manifest,
)
from onbeat.runtime.language import WrongEmbodiment

NAME = "ckpt_a2.case_02_mpg1"
FILES = (
    "prefix.onnx",
    "flow.onnx",
    "weights.bin",
    "tokenizer.json",
    "embodiment.toml",
    "language.json",
    MANIFEST_FILE,
    SEAL_FILE,
)


@pytest.fixture
def bundle(golden_bundles: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(golden_bundles / NAME, tmp_path / "bundle"))


def test_whole_bundle_loads(bundle: Path) -> None:
    manifest = load_bundle(bundle).manifest
    assert {*manifest.files, MANIFEST_FILE, SEAL_FILE} == {path.name for path in bundle.iterdir()} == set(FILES)
    assert manifest.embodiment == "libero"
    assert manifest.rope == "fp32"
    assert manifest.checkpoint.name == "ckpt_a2/checkpoint"


def test_manifest_names_every_shape_and_type(bundle: Path) -> None:
    graphs = load_bundle(bundle).manifest.graphs
    assert graphs["prefix"].inputs == {
        "views": ["uint8", [2, 56, 56, 3]],
        "token_ids": ["int64", ["tokens"]],
        "state": ["float32", [200]],
    }
    cache = {f"{kind}_{k:02d}": ["float32", [2, "tokens", 16]] for k in range(3) for kind in ("key", "value")}
    assert graphs["prefix"].outputs == cache
    assert graphs["flow"].inputs == {
        **cache,
        "noise": ["float32", [2, 16, 200]],
        "directions": ["float32", [1, 4, 16, 64]],
        "prev_chunk": ["float32", [16, 200]],
        "delay": ["int64", []],
        "guidance_weights": ["float32", [16]],
        "guidance_beta": ["float32", []],
    }
    assert graphs["flow"].outputs == {
        "actions": ["float32", [16, 200]],
        "gate": ["float32", [1, 4]],
        "cost": ["float32", [1, 4]],
    }


def test_manifest_survives_json(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_changed_byte(bundle: Path, name: str, where: float) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=r"again|version"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(NotABundle if name == MANIFEST_FILE else DamagedBundle, match=name):
        load_bundle(bundle)


def test_truncated_weights(bundle: Path) -> None:
    path = bundle / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedBundle, match=r"weights\.bin was changed"):
        load_bundle(bundle)


def test_file_that_is_not_of_the_bundle(bundle: Path) -> None:
    (bundle / "libero_metadata.json").write_text("{}")
    with pytest.raises(DamagedBundle, match=r"libero_metadata\.json, which the manifest does not name"):
        load_bundle(bundle)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotABundle, match="onbeat export"):
        load_bundle(tmp_path)
    with pytest.raises(NotABundle, match="onbeat export"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("version", None), ("format", "other"), ("format", None)])
def test_unknown_version(bundle: Path, key: str, value: object) -> None:
    document = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps({**document, key: value}))
    with pytest.raises(UnknownBundleVersion, match="export the checkpoint again"):
        load_bundle(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_manifest_that_is_none(bundle: Path, content: str) -> None:
    (bundle / MANIFEST_FILE).write_text(content)
    with pytest.raises(DamagedBundle, match="cannot be read"):
        load_bundle(bundle)


def test_sealed_manifest_with_a_field_missing(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    document = manifest.to_json()
    del document["rope"]
    seal_document(bundle, document)
    with pytest.raises(DamagedBundle, match="rope"):
        load_bundle(bundle)


def seal_document(bundle: Path, document: dict) -> None:
    """Write any document with a valid seal, as a careless tool would."""

    class Written:
        def to_json(self) -> dict:
            return document

    write_manifest(Written(), bundle)  # pyright: ignore[reportArgumentType]


def test_another_robot(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.open_language("libero").embodiment.name == "libero"
    with pytest.raises(WrongEmbodiment, match=r"'libero'.*'robocasa'"):
        loaded.open_language("robocasa")
