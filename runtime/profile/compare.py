"""Two runs side by side: what changed per stage, whether by more than runs of the same differ, and what else differs.

A difference counts where it is beyond the A/A spread (spread.py). Whether it is *because* of what was meant to change
depends on what else changed, so every difference in machine, clocks, bundle and configuration is named first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from onbeat.runtime.measures import figure, text_table
from onbeat.runtime.profile.conditions import conditions_words, is_throttled
from onbeat.runtime.profile.figures import JUDGED, after_start
from onbeat.runtime.profile.spread import SAME, UNKNOWN, Judgement, judge
from onbeat.runtime.run_records import RunRecords
from onbeat.runtime.summary import STAGES, stage_samples

ASIDE: Final = frozenset({"run_dir", "seed", "seconds"})  # of the config: what may differ between runs of the same
LEAST_CLOCK_CHANGE: Final = 0.02  # of a clock's median
LEAST_LOAD_CHANGE: Final = 0.5  # of the lower load


@dataclass(frozen=True, slots=True)
class StageVerdict:
    """One stage in two runs, ns. verdict: one of spread's words, of the median or, where that stayed, of the tail."""

    stage: str
    verdict: str
    percentiles: tuple[Judgement, ...]

    @property
    def told(self) -> Judgement:
        """The percentile that the verdict is from."""
        return next((j for j in self.percentiles if j.verdict == self.verdict), self.percentiles[0])


@dataclass(frozen=True, slots=True)
class Comparison:
    """differences: what else is not the same, in words; each makes the verdicts mean less. again: further runs of A."""

    differences: tuple[str, ...]
    stages: tuple[StageVerdict, ...]
    again: int


def compare(
    a: RunRecords, b: RunRecords, profiles: Sequence[Mapping[str, Any]], again: Sequence[RunRecords] = ()
) -> Comparison:
    """profiles: of a and of b. again: further runs of what `a` is; how far they lie from it is no difference."""
    samples = [stage_samples(after_start(run)) for run in (a, b, *again)]
    verdicts = (_verdict(key, [of_run[key] for of_run in samples]) for key in STAGES)
    return Comparison(tuple(differences(*profiles)), tuple(verdicts), len(again))


def _verdict(key: str, runs: Sequence[Any]) -> StageVerdict:
    judgements = judge(runs[0], runs[1], JUDGED, runs[2:])
    known = [j.verdict for j in judgements if j.verdict != UNKNOWN]
    changed = [verdict for verdict in known if verdict != SAME]
    return StageVerdict(STAGES[key].name, (changed or known or [UNKNOWN])[0], judgements)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two profiles beside their latencies, and what makes either doubtful."""
    for name in ("robot", "mode", "instruction", "bundle_sha256", "git_commit", "versions", "real_time"):
        yield from _difference(name, a[name], b[name])
    yield from _difference("config", _told(a["config"]), _told(b["config"]))
    for name in ("model", "cores", "kernel", "release", "power_mode", "cpu_governor", "gpu_governor"):
        yield from _difference(name, a["conditions"][name], b["conditions"][name])
    yield from _clocks(a["conditions"]["clocks_hz"] or {}, b["conditions"]["clocks_hz"] or {})
    yield from _load(a["conditions"]["load"], b["conditions"]["load"])
    for label, profile in (("A", a), ("B", b)):
        if is_throttled(profile["conditions"]):
            yield f"{label} was throttled: {dict(conditions_words(profile['conditions']))['throttling']}"
        yield from (f"{label}: {problem}" for problem in profile["log_problems"])


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ASIDE}


def _difference(name: str, a: Any, b: Any) -> Iterator[str]:
    """Objects field by field, to name what in them differs. Ports and cameras of a twin are new each time."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in (*a, *(key for key in b if key not in a)):
            if key not in ("port", "cameras"):
                yield from _difference(f"{name}.{key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{name}: {_brief(a)} against {_brief(b)}"


def _brief(value: Any) -> str:
    text = "not known" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _clocks(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for name in a.keys() & b.keys():
        one, other = a[name]["median"], b[name]["median"]
        if abs(other - one) > LEAST_CLOCK_CHANGE * one:
            yield f"{name}: median {one / 1e6:.0f} against {other / 1e6:.0f} MHz"


def _load(a: float | None, b: float | None) -> Iterator[str]:
    """What else wanted the processors; runs on a busy machine differ by that alone."""
    if a is not None and b is not None and abs(a - b) > max(1.0, LEAST_LOAD_CHANGE * min(a, b)):
        yield f"load: {a:.1f} against {b:.1f}"


ONE_PROCESS: Final = (
    "One process each: two of the same thing may differ too. Further runs of A, given with --again, tell by how much."
)
HEADS: Final = ("stage", "figure", "A ms", "B ms", "change", "A/A spread", "verdict")


def rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """A line per percentile that can be judged; the stage's verdict on its first."""
    for stage in comparison.stages:
        told = [j for j in stage.percentiles if j.verdict != UNKNOWN] or stage.percentiles[:1]
        for k, judgement in enumerate(told):
            yield (stage.stage if k == 0 else "", f"p{judgement.percent:g}", *_cells(judgement), judgement.verdict)


def _cells(judgement: Judgement) -> tuple[str, ...]:
    a, b, spread = (None if v is None else v / 1e6 for v in (judgement.a, judgement.b, judgement.spread))
    change = "-" if judgement.change is None else f"{judgement.change:+.1%}"
    share = "-" if spread is None or not a else f"±{spread / a:.1%}"
    return figure(a, 3), figure(b, 3), change, share


def as_text(comparison: Comparison) -> str:
    """What else differs, then the table, then each stage that changed in one line."""
    warnings = [f"differs: {words}" for words in comparison.differences] or ["nothing else that is known differs"]
    changed = [_sentence(s) for s in comparison.stages if s.verdict not in (SAME, UNKNOWN)]
    end = changed or ["no stage differs by more than runs of the same do"]
    if changed and not comparison.again:
        end.append(ONE_PROCESS)
    return "\n".join([*warnings, "", text_table(HEADS, rows(comparison)), "", *end])


def _sentence(stage: StageVerdict) -> str:
    told = stage.told
    assert told.change is not None, stage
    return f"{stage.stage}: B is {stage.verdict} by {abs(told.change):.1%} (p{told.percent:g})"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """{differences: [text], again: count, stages: [{stage, verdict, percentiles: [{percent, a_ms, ..., verdict}]}]}."""
    return {
        "differences": list(comparison.differences),
        "again": comparison.again,
        "stages": [
            {"stage": s.stage, "verdict": s.verdict, "percentiles": [_json(j) for j in s.percentiles]}
            for s in comparison.stages
        ],
    }


def _json(judgement: Judgement) -> dict[str, Any]:
    values = asdict(judgement)
    in_ms = {f"{name}_ms": values[name] for name in ("a", "b", "spread", "low", "high")}
    scaled = {name: None if value is None else value / 1e6 for name, value in in_ms.items()}
    return {"percent": judgement.percent, **scaled, "change": judgement.change, "verdict": judgement.verdict}
