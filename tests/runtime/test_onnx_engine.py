"""The engine on ONNX Runtime: one set of buffers, and every wrong array refused before it runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onbeat.runtime.bundle import load_bundle
from onbeat.runtime.cases import Case, case_language, load_cases
from onbeat.runtime.engine import PolicyInputs
from onbeat.runtime.onnx_engine import InputError, OnnxEngine, fit_chunk

PLAIN, GATED, LOCKED = 0, 1, 3


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[Case]:
    return load_cases(golden)


def open_case(case: Case, bundles: Path) -> tuple[OnnxEngine, PolicyInputs]:
    folder = bundles / case.name.replace("/", ".")
    inputs = case_language(folder, case).inputs(case.observation, case.instruction)
    return load_bundle(folder).open_engine(), inputs


@pytest.fixture
def plain(cases: list[Case], golden_bundles: Path) -> tuple[OnnxEngine, PolicyInputs]:
    return open_case(cases[PLAIN], golden_bundles)


@pytest.fixture
def gated(cases: list[Case], golden_bundles: Path) -> tuple[OnnxEngine, PolicyInputs]:
    return open_case(cases[GATED], golden_bundles)


def noise_of(engine: OnnxEngine, seed: int = 0) -> np.ndarray:
    shape = (engine.spec.sampler.iterations, engine.spec.chunk, 200)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pointers(binding_arrays: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: array.ctypes.data for name, array in binding_arrays.items()}


def test_cache_is_written_and_read_at_one_address(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    handle = engine.prefix(inputs)
    prefix, flow = engine._bound
    written, read = pointers(prefix.outputs), pointers(flow.inputs)
    assert len(written) == 6
    assert written == {name: read[name] for name in written} == pointers(dict(handle.arrays))
    bound = {name: value.data_ptr() for name, value in zip(written, prefix.binding.get_outputs(), strict=True)}
    assert bound == written
    assert all(np.abs(array).max() > 0 for array in handle.arrays.values())


def test_flow_reads_the_shared_cache(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    handle = engine.prefix(inputs)
    before = engine.flow(handle, noise_of(engine)).actions
    handle.arrays["value_01"][:] = 0
    assert np.abs(engine.flow(handle, noise_of(engine)).actions - before).max() > 1e-3


def test_same_question_same_bits(gated: tuple[OnnxEngine, PolicyInputs], cases: list[Case]) -> None:
    engine, inputs = gated
    answers = [
        engine.flow(engine.prefix(inputs), cases[GATED].noise, directions=cases[GATED].directions) for _ in range(2)
    ]
    assert np.array_equal(answers[0].actions, answers[1].actions)
    assert answers[0].actions is not answers[1].actions
    assert answers[0].gate.shape == answers[0].cost.shape == (1, 4)


def test_buffers_are_kept_for_one_length_and_renewed_for_another(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    longer = replace(inputs, token_ids=np.append(inputs.token_ids, inputs.token_ids[-3:]))
    first = engine.flow(engine.prefix(inputs), noise_of(engine)).actions
    kept = engine._bound
    engine.prefix(inputs)
    assert engine._bound is kept
    other = engine.flow(engine.prefix(longer), noise_of(engine)).actions
    assert engine._bound is not kept
    assert np.abs(other - first).max() > 1e-4
    assert np.array_equal(engine.flow(engine.prefix(inputs), noise_of(engine)).actions, first)


def test_overwritten_prefix(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    stale = engine.prefix(inputs)
    engine.prefix(inputs)
    with pytest.raises(InputError, match="overwritten"):
        engine.flow(stale, noise_of(engine))


def test_failed_prefix_leaves_no_handle(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    handle = engine.prefix(inputs)
    with pytest.raises(Exception, match=r"(?i)indices|index|range|out of"):
        engine.prefix(replace(inputs, token_ids=np.full_like(inputs.token_ids, 10**6)))
    with pytest.raises(InputError):
        engine.flow(handle, noise_of(engine))


def test_committed_rows_come_back_untouched(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    handle, previous = engine.prefix(inputs), np.random.default_rng(1).standard_normal((16, 200), np.float32)
    free = engine.flow(handle, noise_of(engine)).actions
    for delay in (1, 7, 16):
        actions = engine.flow(handle, noise_of(engine), prev_chunk=previous, delay=delay).actions
        assert np.array_equal(actions[:delay], previous[:delay])
        assert delay == 16 or np.abs(actions[delay:] - free[delay:]).max() > 1e-4
    assert np.array_equal(engine.flow(handle, noise_of(engine), prev_chunk=previous, delay=0).actions, free)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_previous_chunk_of_any_length(rows: int) -> None:
    previous = np.random.default_rng(2).standard_normal((rows, 200), np.float32)
    fitted = fit_chunk(previous, 16)
    assert fitted.shape == (16, 200)
    assert all(np.array_equal(fitted[k], previous[min(k, rows - 1)]) for k in range(16))


@pytest.mark.parametrize("shape", [(0, 200), (16, 199), (16,), (1, 16, 200)])
def test_bad_previous_chunk(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="rows of 200"):
        fit_chunk(np.zeros(shape, np.float32), 16)


@pytest.mark.parametrize("delay", [-1, 17])
def test_delay_outside_the_chunk(plain: tuple[OnnxEngine, PolicyInputs], delay: int) -> None:
    engine, inputs = plain
    with pytest.raises(InputError, match="0 to 16"):
        engine.flow(engine.prefix(inputs), noise_of(engine), prev_chunk=np.zeros((16, 200), np.float32), delay=delay)


def test_delay_without_rows(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    with pytest.raises(InputError, match="give prev_chunk"):
        engine.flow(engine.prefix(inputs), noise_of(engine), delay=2)


def test_missing_directions(gated: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = gated
    with pytest.raises(InputError, match="directions"):
        engine.flow(engine.prefix(inputs), noise_of(engine))


def test_bad_noise(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    engine, inputs = plain
    handle, noise = engine.prefix(inputs), noise_of(engine)
    with pytest.raises(InputError, match="noise"):
        engine.flow(handle, noise[:, :-1])
    noise[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="finite"):
        engine.flow(handle, noise)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("views", np.zeros((1, 224, 224, 3), np.uint8)),
        ("views", np.zeros((2, 224, 225, 3), np.uint8)),
        ("views", np.zeros((2, 224, 224, 3), np.float32)),
        ("state", np.zeros(199, np.float32)),
        ("state", np.full(200, np.inf, np.float32)),
        ("token_ids", np.zeros(3, np.int64)),
        ("image_start", 7),
        ("state_index", 7),
    ],
)
def test_bad_inputs(plain: tuple[OnnxEngine, PolicyInputs], field: str, value: object) -> None:
    engine, inputs = plain
    with pytest.raises(InputError):
        engine.prefix(replace(inputs, **{field: value}))


def test_idle_threads_sleep(plain: tuple[OnnxEngine, PolicyInputs]) -> None:
    for session in plain[0]._sessions:
        options = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.intra_op_num_threads == 1


def test_more_threads_same_answer(cases: list[Case], golden_bundles: Path) -> None:
    case = cases[PLAIN]
    folder = golden_bundles / case.name.replace("/", ".")
    inputs = case_language(folder, case).inputs(case.observation, case.instruction)
    engine = load_bundle(folder).open_engine(threads=2)
    assert engine._sessions[0].get_session_options().intra_op_num_threads == 2
    assert np.abs(engine.flow(engine.prefix(inputs), case.noise).actions - case.actions).max() < 1e-5
