"""What is written to a flight log is what is read, by this reader and by others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory

from onbeat.runtime.flight.encoding import JPEG, decode, encode, encode_frame, encode_rows, layout_of, parse_schema
from onbeat.runtime.flight.encoding import schema_text as text_of
from onbeat.runtime.flight.messages import BY_TOPIC, CDR, DOCUMENT, FORMAT, LETTERS, MESSAGES, TEXT, document
from onbeat.runtime.flight.reader import LogError, NoLog, read_log
from onbeat.runtime.flight.writer import LogWriter

SIZES = {"J": 6, "V": 2, "C": 4, "A": 200, "I": 3, "K": 2, "T": 2, "M": 1, "H": 5, "N": 4, "P": 3}
HEADER = {"format": FORMAT, "started_ns": 10**9, "cameras": ["top", "wrist"], "sizes": SIZES, "config": {"x": 1}}
CDR_TOPICS = [message.topic for message in MESSAGES if message.encoding == CDR]


def random_values(topic: str, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    """A value per field, whole and with every bit in use; floats include what is no number."""
    generator = np.random.default_rng(seed)
    layout = layout_of(BY_TOPIC[topic], sizes)
    values: dict[str, Any] = {"instruction": "lift the röd cube " + "x" * seed}
    for name in layout.fixed.names or ():
        field = layout.fixed[name]
        values[name] = np.frombuffer(generator.bytes(field.itemsize), field.base).reshape(field.shape)
    return values


def assert_same_bits(records: np.ndarray, k: int, values: dict[str, Any]) -> None:
    for name in records.dtype.names or ():
        expected = values[name]
        if isinstance(expected, str):
            assert records[name][k] == expected
        else:
            assert records[name][k].tobytes() == expected.tobytes(), name


def write_log(folder: Path, *, messages: int = 3) -> dict[str, list[dict[str, Any]]]:
    written = {topic: [random_values(topic, k) for k in range(messages)] for topic in CDR_TOPICS}
    with LogWriter(folder, HEADER) as log:
        for k in range(messages):
            for topic in CDR_TOPICS:
                log.write_values(topic, written[topic][k], 10**9 + k)
            for camera in HEADER["cameras"]:
                log.write(f"/camera/{camera}", encode_frame(picture(k), 5 * 10**9 + k, camera), 10**9 + k)
            log.write_values("/event", {"t_ns": k, "event": "fault", "name": "CHUNK_LATE"}, k)
            log.sync()
        log.write_values("/outcome", {"t_ns": 9, "error": None}, 10**9 + 9)
    return written


def picture(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (7, 5, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.parametrize("topic", CDR_TOPICS)
def test_eight_byte_fields_stand_first_and_text_last(topic: str):
    sizes = {"int64": 8, "float64": 8, "float32": 4, "uint8": 1, TEXT: 0}
    kinds = [sizes[f.kind] for f in BY_TOPIC[topic].fields]
    assert kinds == sorted(kinds, reverse=True)


def test_names_and_letters_of_the_table_are_known():
    for message in MESSAGES:
        names = [field.name for field in message.fields]
        assert len(names) == len(set(names)), message.topic
        assert all(letter in LETTERS for field in message.fields for letter in field.shape.split())


def test_the_document_shows_this_table():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `python -m onbeat.runtime.flight.messages --write`"


@pytest.mark.parametrize("topic", CDR_TOPICS)
def test_a_schema_tells_the_layout(topic: str):
    for sizes in (SIZES, {**SIZES, "K": 0}, {**SIZES, "J": 1, "C": 1}):
        assert parse_schema(text_of(BY_TOPIC[topic], sizes)) == layout_of(BY_TOPIC[topic], sizes)


@pytest.mark.parametrize("topic", CDR_TOPICS)
def test_every_bit_survives(topic: str):
    layout = layout_of(BY_TOPIC[topic], SIZES)
    values = [random_values(topic, seed) for seed in range(5)]
    records = decode(layout, [encode(layout, value) for value in values])
    for k, value in enumerate(values):
        assert_same_bits(records, k, value)
    if not layout.texts:
        assert list(encode_rows(records)) == [encode(layout, value) for value in values]


def test_rows_that_are_not_given_are_nan():
    layout = layout_of(BY_TOPIC["/chunk"], SIZES)
    values = {**random_values("/chunk", 0), "targets_rad": np.ones((2, 6))}
    targets = decode(layout, [encode(layout, values)])["targets_rad"][0]
    assert (targets[:2] == 1).all()
    assert np.isnan(targets[2:]).all()


def test_a_log_reads_as_it_was_written(folder: Path):
    written = write_log(folder)
    log = read_log(folder)
    assert log.header == HEADER
    assert log.problems == ()
    assert log.outcome == {"t_ns": 9, "error": None}
    assert [event["t_ns"] for event in log.events] == [0, 1, 2]
    for topic in CDR_TOPICS:
        records = log.records(topic)
        for k, values in enumerate(written[topic]):
            assert_same_bits(records, k, values)
    for camera in log.cameras:
        frames = list(log.frames(camera))
        assert [t_ns for t_ns, _ in frames] == [5 * 10**9 + k for k in range(3)]
        assert all((rgb == picture(k)).all() for k, (_, rgb) in enumerate(frames))


def test_another_decoder_of_cdr_reads_the_same(folder: Path):
    written = write_log(folder)
    with (folder / "000000.mcap").open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()], validate_crcs=True)
        seen: dict[str, list[Any]] = {}
        for _, channel, _, decoded in reader.iter_decoded_messages(topics=[*CDR_TOPICS, "/camera/top"]):
            seen.setdefault(channel.topic, []).append(decoded)
    for topic in CDR_TOPICS:
        for values, decoded in zip(written[topic], seen[topic], strict=True):
            for name in (field.name for field in BY_TOPIC[topic].fields):
                got, expected = getattr(decoded, name), values[name]
                if isinstance(expected, str):
                    assert got == expected
                else:
                    got = list(got) if isinstance(got, bytes) else got
                    np.testing.assert_array_equal(np.asarray(got, expected.dtype).reshape(expected.shape), expected)
    image = seen["/camera/top"][1]
    assert (image.header.stamp.sec, image.header.stamp.nanosec) == (5, 1)
    assert (image.header.frame_id, image.format) == ("top", "png")
    assert bytes(image.data).startswith(b"\x89PNG")


def test_json_messages_have_schemas(folder: Path):
    write_log(folder)
    with (folder / "000000.mcap").open("rb") as stream:
        schema, _, message = next(iter(make_reader(stream).iter_messages(topics=["/header"])))
    assert schema is not None
    assert set(json.loads(message.data)) <= set(json.loads(schema.data)["properties"])


def test_a_jpeg_is_near(folder: Path):
    smooth = np.tile(np.arange(0, 240, 8, dtype=np.uint8)[:, None, None], (1, 30, 3))
    with LogWriter(folder, HEADER) as log:
        log.write("/camera/top", encode_frame(smooth, 7, "top", JPEG), 7)
    ((t_ns, rgb),) = read_log(folder).frames("top")
    assert t_ns == 7
    assert np.abs(rgb.astype(int) - smooth).max() <= 4


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path):
    with pytest.raises(NoLog, match="give the folder"):
        read_log(tmp_path)
    with LogWriter(folder, HEADER):
        pass
    log = read_log(folder)
    assert log.problems == ("the run was cut short: the log has no outcome",)
    assert len(log.records("/tick")) == 0
    with pytest.raises(LogError, match="no /torque"):
        log.records("/torque")
    write_log(folder)
    with pytest.raises(LogError, match=r"no /tick\.torque_nm"):
        read_log(folder).records("/tick", "t_ns", "torque_nm")


def test_the_oldest_files_go_and_every_file_begins_with_the_header(folder: Path):
    layout = layout_of(BY_TOPIC["/tick"], SIZES)
    messages = [encode(layout, random_values("/tick", k)) for k in range(16)]
    with LogWriter(folder, HEADER, budget_bytes=600_000) as log:
        for k in range(16):
            for _ in range(200):
                log.write("/tick", messages[k], 10**9 + k)
            log.sync()
    files = sorted(folder.iterdir())
    assert 4 < len(files) < 10
    assert sum(file.stat().st_size for file in files) <= 600_000
    for file in files:
        assert read_log(file).header == HEADER
    log = read_log(folder)
    assert "were given up for the disk budget" in log.problems[0]
    assert_same_bits(log.records("/tick"), -1, random_values("/tick", 15))
