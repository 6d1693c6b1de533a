"""`onbeat verify`: answer recorded cases again and say how far the answers are off. Imports neither torch nor onnx."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onbeat.embodiment.errors import OnbeatError
from onbeat.export.digest import digest_checkpoint
from onbeat.runtime.bundle import MANIFEST_FILE, Bundle, Manifest, load_bundle, read_manifest
from onbeat.runtime.cases import Case, Replay, case_language, load_cases, replay_case

TOLERANCE = 1e-5

Replayer = Callable[[Case], Replay]


class NoBundle(OnbeatError):
    """No exported bundle fits a case, and none can be made here."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case's answer. passed: every difference is a number within the tolerance."""

    case: Case
    replay: Replay
    passed: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Verify; returns 0 when every case is within the tolerance, 1 otherwise."""
    arguments = parse_arguments(argv)
    try:
        verdicts = verify(
            arguments.cases,
            backend=arguments.backend,
            bundles=arguments.bundles,
            rope=arguments.rope,
            tolerance=arguments.tolerance,
        )
    except OnbeatError as problem:
        print(f"onbeat verify: {problem}", file=sys.stderr)
        return 1
    print(format_json(verdicts, arguments.tolerance) if arguments.json else format_table(verdicts, arguments.tolerance))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="onbeat verify",
        description="Replay recorded cases with their own noise and directions; exit 1 above the tolerance.",
    )
    parser.add_argument("--cases", type=Path, required=True, metavar="DIR", help="folder of recorded cases")
    backend = "what answers (default: %(default)s)"
    parser.add_argument("--backend", choices=("torch", "onnx"), default="torch", help=backend)
    bundles = "exported bundles for the onnx backend; without it, they are made in a temporary folder (needs torch)"
    parser.add_argument("--bundles", type=Path, metavar="DIR", help=bundles)
    tolerance = "largest absolute difference of the normalised actions (default: %(default)g)"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=tolerance)
    rope = "precision of the rotary frequencies the cases were recorded with (default: %(default)s)"
    parser.add_argument("--rope", choices=("bf16", "fp32"), default="fp32", help=rope)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def verify(
    cases: Path,
    *,
    backend: str = "torch",
    bundles: Path | None = None,
    rope: str = "fp32",
    tolerance: float = TOLERANCE,
) -> list[Verdict]:
    """Replay every case of a folder. Raises OnbeatError when one cannot be replayed."""
    recorded = load_cases(cases)
    if backend == "torch":
        return _judge(recorded, _torch_replayer(cases, rope), tolerance)
    if bundles is not None:
        return _judge(recorded, _bundle_replayer(cases, bundles, rope), tolerance)
    with tempfile.TemporaryDirectory(prefix="onbeat-verify-") as folder:
        return _judge(recorded, _exporting_replayer(cases, Path(folder), rope), tolerance)


def _judge(cases: Sequence[Case], replay: Replayer, tolerance: float) -> list[Verdict]:
    verdicts = []
    for case in cases:
        answer = replay(case)
        verdicts.append(Verdict(case, answer, answer.worst <= tolerance))
    return verdicts


def _torch_replayer(cases: Path, rope: str) -> Replayer:
    from onbeat.training.torch_engine import open_engine

    def replay(case: Case) -> Replay:
        folder = cases / case.checkpoint
        engine = open_engine(
            folder,
            views=len(case.views),
            rope=rope,
            overrides=case.overrides,
            directions=case.directions is not None,
            enable_rtc=case.enable_rtc,
        )
        return replay_case(case, engine, case_language(folder, case))

    return replay


def _exporting_replayer(cases: Path, folder: Path, rope: str) -> Replayer:
    try:
        from onbeat.export.bundling import export_bundle
        from onbeat.export.export import case_recipe
    except ModuleNotFoundError as missing:
        raise NoBundle(
            f"the package '{missing.name}' is not installed, so nothing can be exported here: run "
            f"`onbeat export --cases {cases} OUT` where it is, and pass --bundles OUT"
        ) from None

    def replay(case: Case) -> Replay:
        bundle = export_bundle(case_recipe(cases, case, rope=rope), folder / case.name.replace("/", "."))
        return _replay_bundle(case, bundle)

    return replay


def _bundle_replayer(cases: Path, bundles: Path, rope: str) -> Replayer:
    def replay(case: Case) -> Replay:
        return _replay_bundle(case, load_bundle(find_bundle(case, cases, bundles, rope)))

    return replay


def _replay_bundle(case: Case, bundle: Bundle) -> Replay:
    return replay_case(case, bundle.open_engine(), case_language(bundle.folder, case))


def find_bundle(case: Case, cases: Path, bundles: Path, rope: str) -> Path:
    """The bundle of the case's checkpoint and sampler. Raises NoBundle, and BundleError for a damaged manifest."""
    for folder in sorted({path.parent for path in bundles.glob(f"**/{MANIFEST_FILE}")}):
        if fits(read_manifest(folder), case, cases / case.checkpoint, rope):
            return folder
    raise NoBundle(
        f"no bundle in {bundles} fits {case.name}: "
        f"run `onbeat export --cases {cases} {bundles}` where torch is installed"
    )


def fits(manifest: Manifest, case: Case, checkpoint: Path, rope: str) -> bool:
    """Whether a bundle can answer a case: same network, sampler, views and rotary precision.

    The network is told by the checkpoint's hash, or by its name where the checkpoint is gone.
    """
    policy, source = manifest.policy, manifest.checkpoint
    if (policy.sampler, policy.views, manifest.rope) != (case.sampler, len(case.views), rope):
        return False
    if manifest.embodiment != case.embodiment.name:
        return False
    return source.sha256 == digest_checkpoint(checkpoint) if checkpoint.is_dir() else source.name == case.checkpoint


def format_table(verdicts: Sequence[Verdict], tolerance: float) -> str:
    """A line per case and one for all."""
    names = [("case", "robot"), *((verdict.case.name, verdict.case.embodiment.name) for verdict in verdicts)]
    cases, robots = (max(map(len, column)) for column in zip(*names, strict=True))
    labels = [f"{case:<{cases}}  {robot:<{robots}}" for case, robot in names]
    answers = [f"{'action_pred':>11}  {'action keys':>11}  within {tolerance:g}", *map(_format_verdict, verdicts)]
    lines = [f"{label}  {answer}" for label, answer in zip(labels, answers, strict=True)]
    failed = sum(not verdict.passed for verdict in verdicts)
    total = f"{len(verdicts)} cases, {failed} above the tolerance" if failed else f"{len(verdicts)} cases, all within"
    return "\n".join([*lines, total])


def _format_verdict(verdict: Verdict) -> str:
    worst_key = max(verdict.replay.keys.values(), default=0.0)
    return f"{verdict.replay.actions:>11.2e}  {worst_key:>11.2e}  {'yes' if verdict.passed else 'NO'}"


def format_json(verdicts: Sequence[Verdict], tolerance: float) -> str:
    """The same for a script."""
    rows: list[dict[str, Any]] = [
        {
            "case": verdict.case.name,
            "embodiment": verdict.case.embodiment.name,
            "action_pred": verdict.replay.actions,
            "action_keys": dict(verdict.replay.keys),
            "passed": verdict.passed,
        }
        for verdict in verdicts
    ]
    passed = all(verdict.passed for verdict in verdicts)
    return json.dumps({"tolerance": tolerance, "passed": passed, "cases": rows}, indent=1)
