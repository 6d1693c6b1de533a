"""`onbeat export`: compile a checkpoint, or the checkpoints of recorded cases, into bundles."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.schema import embodiment_names
from onbeat.export.bundling import GATES, Recipe, export_bundle
from onbeat.export.proof import TOLERANCE
from onbeat.runtime.bundle import Bundle
from onbeat.runtime.cases import Case, case_language, load_cases
from onbeat.runtime.language import PolicyLanguage


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns 0, or 1 when something could not be exported."""
    arguments = parse_arguments(argv)
    try:
        rows = list(_export_cases(arguments) if arguments.cases else _export_one(arguments))
    except OnbeatError as problem:
        print(f"onbeat export: {problem}", file=sys.stderr)
        return 1
    print(json.dumps(rows, indent=1) if arguments.json else format_rows(rows))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="onbeat export",
        description="Compile a checkpoint into a bundle: two ONNX graphs, proven against the PyTorch network.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="checkpoint folder in the published format")
    parser.add_argument("out", type=Path, help="bundle folder to write (with --cases: a folder of bundles)")
    parser.add_argument("--cases", type=Path, metavar="DIR", help="export what the recorded cases in DIR need instead")
    parser.add_argument("--embodiment", metavar="NAME", help=f"robot: {', '.join(embodiment_names())}, or a .toml file")
    parser.add_argument("--dataset", metavar="NAME", help="data set whose statistics to take (default: the only one)")
    parser.add_argument("--variant", metavar="NAME", help="variant of the statistics (default: the only one)")
    parser.add_argument("--steps", type=int, metavar="N", help="flow steps (default: the checkpoint's)")
    parser.add_argument("--refinements", type=int, metavar="N", help="gated refinements (default: the checkpoint's)")
    parser.add_argument(
        "--gate", choices=GATES, default="expectation", help="how the gate's cost is taken (default: %(default)s)"
    )
    _add_shared(parser)
    arguments = parser.parse_args(argv)
    if arguments.cases is None and (arguments.checkpoint is None or arguments.embodiment is None):
        parser.error("give CHECKPOINT OUT --embodiment NAME, or --cases DIR OUT")
    if arguments.cases is not None and arguments.checkpoint is not None:
        parser.error("--cases names the checkpoints itself: give only OUT")
    return arguments


def _add_shared(parser: argparse.ArgumentParser) -> None:
    rope = "precision of the rotary frequencies (default: the checkpoint's own, else bf16; fp32 for recorded cases)"
    parser.add_argument("--rope", choices=("bf16", "fp32"), help=rope)
    tolerance = "largest difference from PyTorch, of max(1, largest value) (default: %(default)g)"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=tolerance)
    parser.add_argument("--replace", action="store_true", help="let an existing OUT give way")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _export_one(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    language = PolicyLanguage.from_folder(
        arguments.checkpoint,
        embodiment=arguments.embodiment,
        dataset=arguments.dataset,
        variant=arguments.variant,
    )
    overrides = {"num_inference_timesteps": arguments.steps, "mpg_refinement_iters": arguments.refinements}
    recipe = Recipe(
        checkpoint=arguments.checkpoint,
        name=arguments.checkpoint.resolve().name,
        language=language,
        rope=arguments.rope,
        overrides={name: value for name, value in overrides.items() if value is not None},
        gate=arguments.gate,
        tolerance=arguments.tolerance,
    )
    return [_export_row(recipe, arguments.out, replace=arguments.replace)]


def _export_cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rope = arguments.rope or "fp32"
    rows = []
    for case in load_cases(arguments.cases):
        recipe = case_recipe(arguments.cases, case, rope=rope, tolerance=arguments.tolerance)
        rows.append(_export_row(recipe, arguments.out / case.name.replace("/", "."), replace=arguments.replace))
    return rows


def case_recipe(cases: Path, case: Case, *, rope: str, tolerance: float = TOLERANCE) -> Recipe:
    """What to export so that a case can be replayed: its own sampler settings, directions from outside."""
    checkpoint = cases / case.checkpoint
    return Recipe(
        checkpoint=checkpoint,
        name=case.checkpoint,
        language=case_language(checkpoint, case),
        rope=rope,
        overrides=case.overrides,
        gate=case.sampler.gate if case.sampler.gate == "off" else "directions",
        tolerance=tolerance,
    )


def _export_row(recipe: Recipe, out: Path, *, replace: bool) -> dict[str, Any]:
    start = time.monotonic()
    bundle = export_bundle(recipe, out, replace=replace)
    return describe_export(bundle, time.monotonic() - start)


def describe_export(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """One line of the report."""
    manifest, sampler, experts = bundle.manifest, bundle.manifest.policy.sampler, bundle.manifest.policy.experts
    return {
        "bundle": str(bundle.folder),
        "embodiment": manifest.embodiment,
        "rope": manifest.rope,
        "flow_steps": sampler.flow_steps,
        "iterations": sampler.iterations,
        "gate": sampler.gate,
        "experts": None if experts is None else f"{experts.top_k} of {experts.count}",
        "prefix_difference": manifest.proof.prefix,
        "flow_difference": manifest.proof.flow,
        "megabytes": round(sum((bundle.folder / name).stat().st_size for name in manifest.files) / 1e6, 3),
        "seconds": round(seconds, 3),
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The report as a table."""
    header = f"{'bundle':<44} {'steps':>5} {'iter':>4} {'gate':<11} {'d prefix':>9} {'d flow':>9} {'MB':>8} {'s':>6}"
    return "\n".join([header, *map(_format_row, rows)])


def _format_row(row: dict[str, Any]) -> str:
    what = f"{row['bundle']:<44} {row['flow_steps']:>5} {row['iterations']:>4} {row['gate']:<11}"
    proven = f"{row['prefix_difference']:>9.1e} {row['flow_difference']:>9.1e}"
    return f"{what} {proven} {row['megabytes']:>8.2f} {row['seconds']:>6.2f}"
