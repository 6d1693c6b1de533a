"""A log that was cut, damaged, or written by another version: what is whole is read, what is not is named."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from mcap.opcode import Opcode
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.flight.encoding import encode, encode_frame, layout_of
from onbeat.runtime.flight.messages import BY_TOPIC, FORMAT, LETTERS
from onbeat.runtime.flight.reader import LogError, NoLog, read_log
from onbeat.runtime.flight.writer import LogWriter

SIZES = {**dict.fromkeys(LETTERS, 0), "J": 1, "V": 1, "C": 1}
HEADER = {"format": FORMAT, "started_ns": 0, "cameras": ["top"], "sizes": SIZES, "versions": {"onbeat": "0.1.0"}}
NAME = "000000.mcap"
TICK = layout_of(BY_TOPIC["/tick"], SIZES)


def tick(k: int) -> bytes:
    return encode(TICK, {name: np.full(TICK.fixed[name].shape, k) for name in TICK.fixed.names or ()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with chunks of 1, 2 and 3 ticks and a frame each."""
    folder, k = tmp_path_factory.mktemp("log"), 0
    with LogWriter(folder, HEADER) as log:
        for ticks in (1, 2, 3):
            for _ in range(ticks):
                log.write("/tick", tick(k), k)
                k += 1
            log.write("/camera/top", encode_frame(np.full((2, 2, 3), ticks, np.uint8), ticks, "top"), ticks)
            log.sync()
        log.write_values("/outcome", {"error": None}, k)
    return (folder / NAME).read_bytes()


def chunks_of(content: bytes) -> list[tuple[int, int]]:
    """Where the chunks of a file begin and end: the header's, three, and the outcome's."""
    spans, at = [], 8
    while content[at] != Opcode.DATA_END:
        end = at + 9 + int.from_bytes(content[at + 1 : at + 9], "little")
        if content[at] == Opcode.CHUNK:
            spans.append((at, end))
        at = end
    return spans


@pytest.mark.slow
def test_what_is_before_a_cut_is_read_wherever_the_cut_is(whole: bytes, tmp_path: Path):
    """At every byte of the last chunks, and here and there in the summary behind them."""
    *_, (begin, third_end), (_, end) = chunks_of(whole)
    for cut in (*range(begin, end + 1), *range(end + 1, len(whole), 199), len(whole) - 1):
        (tmp_path / NAME).write_bytes(whole[:cut])
        log = read_log(tmp_path)
        is_third_whole = cut >= third_end
        assert log.records("/tick")["t_ns"].tolist() == list(range(6 if is_third_whole else 3)), cut
        assert any("cut off after" in problem for problem in log.problems), cut
        assert (log.outcome is None) == (cut < end), cut
        if cut % 50 == 0:
            assert [rgb[0, 0, 0] for _, rgb in log.frames("top")] == [1, 2, 3][: 3 if is_third_whole else 2]


def test_a_cut_before_the_first_chunk_ends_leaves_no_log(whole: bytes, tmp_path: Path):
    (_, end), *_ = chunks_of(whole)
    for cut in (0, 3, 8, 20, end // 2, end - 1):
        (tmp_path / NAME).write_bytes(whole[:cut])
        with pytest.raises(NoLog, match="no log can be read"):
            read_log(tmp_path)


def test_a_byte_that_was_changed_is_never_taken_for_a_record(whole: bytes, tmp_path: Path):
    rng = random.Random(4)
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / NAME).write_bytes(content)
        try:
            log = read_log(tmp_path)
        except OnbeatError:
            continue
        assert set(log.records("/tick")["t_ns"].tolist()) <= set(range(6))
        assert all(t_ns == rgb[0, 0, 0] for t_ns, rgb in log.frames("top"))


def test_a_damaged_chunk_costs_no_other(whole: bytes, tmp_path: Path):
    _, _, (begin, end), *_ = chunks_of(whole)
    content = bytearray(whole)
    content[(begin + end) // 2] ^= 1
    (tmp_path / NAME).write_bytes(content)
    log = read_log(tmp_path)
    assert "a chunk is damaged" in log.problems[0]
    assert log.records("/tick")["t_ns"].tolist() == [0, 3, 4, 5]


def test_a_file_that_is_missing_is_named(whole: bytes, tmp_path: Path):
    for number in (0, 2):
        (tmp_path / f"00000{number}.mcap").write_bytes(whole)
    log = read_log(tmp_path)
    assert log.problems == ("file 000001.mcap is missing",)
    assert len(log.records("/tick")) == 12


def test_what_is_no_log_is_refused_by_name(tmp_path: Path):
    (tmp_path / NAME).write_bytes(b"PK not a log")
    with pytest.raises(NoLog, match=r"000000\.mcap is no MCAP file"):
        read_log(tmp_path)


def write_by_hand(path: Path, schema: str, message: bytes, header: dict) -> None:
    """A log as some other version could have written it."""
    with path.open("wb") as stream:
        writer = Writer(stream, compression=CompressionType.NONE)
        writer.start()
        for topic, encoding, text, kind, data in (
            ("/header", "json", b"{}", "jsonschema", json.dumps(header).encode()),
            ("/tick", "cdr", schema.encode(), "ros2msg", message),
        ):
            channel = writer.register_channel(topic, encoding, writer.register_schema(topic, kind, text))
            writer.add_message(channel, 0, data, 0)
        writer.finish()


def test_a_log_of_another_version_gives_what_it_has_and_says_what_it_has_not(tmp_path: Path):
    schema = "int64 t_ns\nfloat64[2] goal_rad  # what was sent\nuint8 colour\n"
    message = b"\0\1\0\0" + np.int64(7).tobytes() + np.array([0.5, 1.5]).tobytes() + b"\3"
    write_by_hand(tmp_path / NAME, schema, message, {"format": 0, "versions": {"onbeat": "0.0.9"}})
    log = read_log(tmp_path)
    assert log.problems[0] == f"format 0, this version reads {FORMAT}: fields may be missing"
    (record,) = log.records("/tick", "t_ns", "goal_rad")
    assert (record["t_ns"], record["goal_rad"].tolist(), record["colour"]) == (7, [0.5, 1.5], 3)
    with pytest.raises(LogError, match=r"no /tick\.due_ns \(written by onbeat 0\.0\.9\): use that version"):
        log.records("/tick", "due_ns")


def test_a_schema_of_another_kind_costs_its_topic(tmp_path: Path):
    write_by_hand(tmp_path / NAME, "geometry_msgs/Pose pose\n", b"\0\1\0\0", {"format": FORMAT})
    log = read_log(tmp_path)
    assert "/tick cannot be read: a schema with the line 'geometry_msgs/Pose pose'" in log.problems[0]
    with pytest.raises(LogError, match="no /tick"):
        log.records("/tick")


def test_a_message_that_is_too_short_costs_its_topic(tmp_path: Path):
    write_by_hand(tmp_path / NAME, "int64 t_ns\n", b"\0\1\0\0abc", {"format": FORMAT})
    log = read_log(tmp_path)
    assert "/tick: a message of fewer than 12 bytes" in log.problems[-1]
    assert len(log.records("/tick")) == 0


def test_the_library_agrees_that_the_whole_file_is_whole(whole: bytes, tmp_path: Path):
    (tmp_path / NAME).write_bytes(whole)
    assert read_log(tmp_path).problems == ()
    with (tmp_path / NAME).open("rb") as stream:
        kinds = {type(record).__name__ for record in StreamReader(stream, validate_crcs=True).records}
    assert {"Message", "Footer", "Statistics"} <= kinds
