"""`onbeat replay`: a flight log again, through the same scheduler, chunker and compiled tick, compared bit by bit."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from onbeat.runtime.bundle import BundleError
from onbeat.runtime.flight.backend import backend, backend_changes
from onbeat.runtime.flight.fault_bits import NAMES
from onbeat.runtime.flight.messages import CHUNK
from onbeat.runtime.flight.recorder import sizes_of
from onbeat.runtime.policy import Policy, load_policy
from onbeat.runtime.provenance import bundle_hash, git_commit, versions
from onbeat.runtime.replay.compare import Difference, FieldReport
from onbeat.runtime.replay.layers import (
    LAYERS,
    MOST_NOISE,
    TICKS,
    Layer,
    replay_recorded_chunks,
    replay_recorded_observations,
    replay_whole,
)
from onbeat.runtime.replay.recording import NotReplayable, Recording, open_recording
from onbeat.runtime.replay.update import rewrite_log

ALL: Final = "all"
EXACT, ROUNDING, DIFFERS, INCOMPLETE = VERDICTS = ("exact", "within noise", "differs", "incomplete")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    log: Path
    bundle: Path | None
    threads: int
    layer: str
    is_update: bool
    is_json: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a replay. not_same: what of the backend is not what it was; empty when it has to be exact.

    floors: field -> how far it moves when only rounding changes. notes: what the replay could not know.
    """

    layers: tuple[Layer, ...]
    not_same: tuple[str, ...]
    floors: Mapping[str, float]
    notes: tuple[str, ...]
    missing: str = ""

    @property
    def verdict(self) -> str:
        """Of all layers, one of VERDICTS. What is exact in all that could be compared may still be incomplete."""
        if any(not self._is_good(layer) for layer in self.layers):
            return DIFFERS
        if self.missing or not any(sum(layer.compared.values()) for layer in self.layers):
            return INCOMPLETE
        return EXACT if all(layer.is_exact for layer in self.layers) else ROUNDING

    def _is_good(self, layer: Layer) -> bool:
        """Ticks know no network: they are exact on every backend."""
        may_round = self.not_same and layer.name != TICKS
        return layer.is_exact or bool(may_round and layer.is_within_noise)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 when the replay is exact, or within noise on another backend; else 1."""
    options = parse(argv)
    recording = open_recording(options.log)
    result = replay(recording, options)
    print(json.dumps(as_json(result)) if options.is_json else as_text(recording, result))
    if options.is_update:
        return _update(recording, result, options)
    return 0 if result.verdict in (EXACT, ROUNDING) else 1


def _update(recording: Recording, result: Result, options: Options) -> int:
    whole = result.layers[-1]
    if result.missing or whole.ticks is None or whole.chunks is None:
        raise NotReplayable(f"nothing was written: {result.missing or 'an update takes every layer'}")
    rewrite_log(recording, whole.ticks, whole.chunks, header_here(recording, options))
    print(f"{options.log} is rewritten: put the table above into the change's description", file=sys.stderr)
    return 0


def header_here(recording: Recording, options: Options) -> dict[str, Any]:
    """The recording's header, with what made the answers that stand in it after an update, and without its devices."""
    header, folder = recording.log.header, bundle_folder(recording, options)
    robot = {**recording.config["robot"], "port": ""}
    made_here = {
        "config": {**recording.config, "robot": robot, "bundle": str(folder)},
        "backend": backend(threads=_threads(recording, options)),
        "bundle_sha256": bundle_hash(folder),
        "versions": versions(),
        "git_commit": git_commit(),
        "faults": NAMES,
    }
    return {**header, **made_here}


def replay(recording: Recording, options: Options) -> Result:
    """The layers asked for. Raises NotReplayable, BundleError."""
    wanted = LAYERS if options.layer == ALL else (options.layer,)
    ticks = [replay_recorded_chunks(recording)] if TICKS in wanted else []
    notes = list(recording.notes)
    if wanted == (TICKS,):
        return Result(tuple(ticks), (), {}, tuple(notes))
    try:
        policy, not_same = open_policy(recording, options)
    except (BundleError, NotReplayable) as problem:
        if options.bundle is not None or TICKS not in wanted:
            raise
        return Result(tuple(ticks), (), {}, tuple(notes), missing=f"only ticks were replayed: {problem}")
    chunks, floors = replay_recorded_observations(recording, policy)
    judged = [chunks] if chunks.name in wanted else []
    whole = [replay_whole(recording, policy, floors)] if LAYERS[-1] in wanted else []
    return Result((*ticks, *judged, *whole), tuple(not_same), floors, tuple(notes))


def bundle_folder(recording: Recording, options: Options) -> Path:
    """The one given, or the one that the log names. Raises NotReplayable when there is neither."""
    if options.bundle is not None:
        return options.bundle
    if not recording.config.get("bundle"):
        raise NotReplayable("the log names no bundle: give the policy with --bundle")
    return Path(recording.config["bundle"])


def open_policy(recording: Recording, options: Options) -> tuple[Policy, list[str]]:
    """The policy, and what makes it another than the recorded one. Raises BundleError, NotReplayable.

    Another bundle than the one that was recorded is opened only when it was given by name.
    """
    folder, recorded = bundle_folder(recording, options), recording.log.header.get("bundle_sha256")
    if options.bundle is None and not folder.is_dir():
        raise NotReplayable(f"the bundle '{folder}' of the log is not there: give it with --bundle")
    here = bundle_hash(folder)
    if options.bundle is None and here != recorded:
        raise NotReplayable(f"the bundle in '{folder}' is not the one of the log: give it with --bundle, or insist")
    threads = _threads(recording, options)
    policy = load_policy(
        folder,
        embodiment=recording.robot.embodiment,
        threads=threads,
        allow_untrained_prefix=bool(recording.config.get("allow_untrained_prefix")),
    )
    _check_sizes(recording, policy)
    changes = backend_changes(recording.log.header["backend"], backend(threads=threads))
    changes += [] if here == recorded else [f"bundle: {recorded} -> {here}"]
    changes += [] if recording.is_lossless else ["frames: the log's are JPEG, which are not what the policy saw"]
    return policy, changes


def _threads(recording: Recording, options: Options) -> int:
    return options.threads or int(recording.log.header["backend"].get("threads", 1))


def _check_sizes(recording: Recording, policy: Policy) -> None:
    recorded = recording.log.header["sizes"]
    here = sizes_of(policy.spec, joints=recorded["J"], views=recorded["V"])
    for letter in sorted({letter for field in CHUNK for letter in field.shape.split()}):
        if here[letter] != recorded[letter]:
            why = f"the bundle has {letter} = {here[letter]}, the log {recorded[letter]} (docs/flight-log.md)"
            raise NotReplayable(f"{why}: give the bundle that the log was made with")


def as_json(result: Result) -> dict[str, Any]:
    """For a script: verdict, what is not the same, floors, and of every layer what differs."""
    return {
        "verdict": result.verdict,
        "not_same": list(result.not_same),
        "noise_floor": dict(result.floors),
        "notes": [*result.notes, *([result.missing] if result.missing else [])],
        "layers": [
            {
                "name": layer.name,
                "compared": dict(layer.compared),
                "is_exact": layer.is_exact,
                "stopped": layer.stopped,
                "first": None if layer.first is None else _plain(asdict(layer.first)),
                "fields": [_plain(asdict(field)) for field in layer.fields],
            }
            for layer in result.layers
        ],
    }


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no number that is not finite."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_text(recording: Recording, result: Result) -> str:
    """For a person: a line per layer, then what differs."""
    return "\n".join(_lines(recording, result))


def _lines(recording: Recording, result: Result) -> Iterator[str]:
    yield from (f"note: {note}" for note in result.notes)
    yield from (f"not the same: {change}" for change in result.not_same)
    if result.floors.get("targets_rad"):
        yield f"noise floor: {result.floors['targets_rad']:.2g} rad in a target"
    for layer in result.layers:
        yield _layer_line(layer)
        yield from (f"  {line}" for line in _field_table(layer.fields))
        if layer.first is not None:
            yield f"  first: {_first_text(recording, layer.first)}"
    if result.missing:
        yield result.missing
    yield f"{result.verdict}" + (f" (at most {MOST_NOISE:g} noise floors)" if result.verdict == ROUNDING else "")


def _layer_line(layer: Layer) -> str:
    counts = ", ".join(f"{count} {topic.strip('/')}s" for topic, count in layer.compared.items())
    state = "every bit the same" if layer.is_exact else f"{len(layer.fields)} fields differ"
    return f"{layer.name:<7} {counts}: {state}" + (f" ({layer.stopped})" if layer.stopped else "")


def _field_table(fields: Sequence[FieldReport]) -> Iterator[str]:
    if fields:
        yield f"{'field':<22}{'differing':>16}{'largest':>12}{'noise floors':>14}"
    for field in fields:
        name, count = f"{field.topic} {field.field}", f"{field.differing} of {field.records}"
        noise = "-" if field.noise is None else f"{field.noise:.1f}"
        yield f"{name:<22}{count:>16}{field.largest:>12.3g}{noise:>14}"


def _first_text(recording: Recording, first: Difference) -> str:
    since_s = (first.t_ns - int(recording.log.header["started_ns"])) / 1e9
    what = "tick" if first.topic == "/tick" else "inference"
    return (
        f"{first.topic} {first.field} of {what} {first.number}, {since_s:.3f} s after the start: "
        f"recorded {first.recorded!r}, replayed {first.replayed!r}"
    )


def parse(argv: Sequence[str] | None) -> Options:
    """The command line, with its defaults."""
    parser = argparse.ArgumentParser(
        prog="onbeat replay",
        description="Replay a flight log through the same code and say where the answer is another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("log", type=Path, help="folder of a run, its log folder, or one file of it")
    parser.add_argument("--bundle", type=Path, help="the policy, if not the one that the log names")
    parser.add_argument("--threads", type=int, default=0, help="of the inference engine, 0: as recorded")
    parser.add_argument("--layer", choices=(*LAYERS, ALL), default=ALL, help="what is replayed on what")
    parser.add_argument("--update", action="store_true", dest="is_update", help="write what was replayed into the log")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print the result as JSON")
    return Options(**vars(parser.parse_args(argv)))
