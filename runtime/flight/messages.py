"""Every message of the flight log, field by field: the one table that encoder, reader, view and docs are made from.

    python -m onbeat.runtime.flight.messages [--write]

To record something more, add a line here and fill it where the others of that message are filled.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1  # of the log; a higher one is written when a reader of this one would misread it
DOCUMENT = Path("docs/flight-log.md")
CDR, JSON, IMAGE = "cdr", "json", "image"
TEXT = "text"

LETTERS = {
    "J": "joints, in the order of the header's `joints`",
    "V": "camera views, in the order of the header's `cameras`",
    "C": "rows of a chunk",
    "A": "unified action slots, 200",
    "I": "iterations of the sampler, 1 + refinements",
    "K": "refinements of the sampler, I - 1",
    "T": "flow steps of an iteration",
    "M": "gate directions",
    "H": "width of the understanding stream",
    "N": "threads, in the order of the header's `machine.threads`",
    "P": "probes of the board, in the order of the header's `machine.probes`",
}


class Field(NamedTuple):
    """kind: a NumPy type, "text", or in a JSON message also "object", "list", "number". shape: letters of LETTERS.

    A field of a letter that is 0 in a run is not there. Rows that a message does not fill are NaN, or 0 in an integer.
    """

    name: str
    kind: str
    shape: str
    unit: str
    meaning: str


class Message(NamedTuple):
    """encoding: CDR (eight-byte fields first, text last), JSON, or IMAGE, which is sensor_msgs/CompressedImage."""

    topic: str
    name: str
    encoding: str
    meaning: str
    fields: tuple[Field, ...]

    @property
    def schema_name(self) -> str:
        return f"onbeat_msgs/msg/{self.name}"


# What `tick` itself knows: its RECORD.
TICK_RECORD = (
    Field("t_ns", "int64", "", "ns", "the time that was ticked: the deadline, monotonic clock"),
    Field("chunk_id", "int64", "", "", "the chunk in force, -1 when none"),
    Field("row", "int64", "", "", "its row, its length once past its end, -1 when none"),
    Field("fraction", "float64", "", "0..1", "of the way to the next row"),
    Field("age_ns", "int64", "", "ns", "since row 0 was due: how old the observation behind this command is"),
    Field("flags", "int64", "", "bits", "what shaped the command: tick.FLAG_NAMES"),
    Field("level", "int64", "", "", "the reaction in force: faults.Level"),
    Field("faults", "int64", "", "bits", "bit k: faults.Fault(k) is there"),
    Field("number", "int64", "", "", "of ticks before this one; a gap is a tick that was not recorded"),
    Field("in_sight", "int64", "", "", "chunks published so far, as this tick saw it; 0 once they were withdrawn"),
    Field("seen", "int64", "", "bits", "bit k: an input showed faults.Fault(k) to this tick"),
    Field("frame_ns", "int64", "", "ns", "stamp of the newest frame of the slowest camera, as this tick saw it"),
)

# What the loop adds.
TICK_LOOP = (
    Field("due_ns", "int64", "", "ns", "the deadline, monotonic clock"),
    Field("start_ns", "int64", "", "ns", "when the tick began, monotonic clock"),
    Field("compute_ns", "int64", "", "ns", "how long the tick took"),
    Field("exchange_ns", "int64", "", "ns", "how long the exchange with the servos took"),
    Field("tell_ns", "int64", "", "ns", "how long the tick before took from there to its end"),
    Field("outcome", "int64", "", "", "of the exchange: a fault code of feetech.protocol, 0 when good"),
    Field("bus_fault", "int64", "", "", "outcome of the exchange before, as this tick saw it"),
    Field("retries", "int64", "", "", "attempts of exchanges that had failed by then"),
    Field("goal_rad", "float64", "J", "rad", "sent"),
    Field("position_rad", "float64", "J", "rad", "read in the exchange before: what this tick saw"),
    Field("velocity_rad_s", "float64", "J", "rad/s", "read with it"),
    Field("load", "float64", "J", "of stall", "read with it"),
    Field("temperature_c", "float64", "J", "C", "read with it"),
    Field("servo_status", "uint8", "J", "bits", "read with it: the servo's error byte"),
)

CHUNK_STAGES = ("camera_age", "observe", "prefix", "flow", "publish")

CHUNK = (
    Field("number", "int64", "", "", "of inferences before this one; a gap is one that was not recorded"),
    Field("chunk_id", "int64", "", "", "as in /tick, -1 when it was refused"),
    Field("observed_ns", "int64", "", "ns", "capture of its observation, monotonic clock; `t_ns` of /observation"),
    Field("t0_ns", "int64", "", "ns", "when row 0 is due: then, or in mode sync when the chunk was published"),
    Field("started_ns", "int64", "", "ns", "the inference began, monotonic clock"),
    Field("inferred_ns", "int64", "", "ns", "the chunk was there and was handed to the loop, monotonic clock"),
    Field("met_ns", "int64", "", "ns", "the last tick's time at that moment, timeline.NEVER before the first"),
    Field("published_ns", "int64", "", "ns", "the loop could see the chunk, monotonic clock"),
    Field("rows", "int64", "", "", "how many the chunk has"),
    Field("budget", "int64", "", "policy steps", "the delay d that was planned with"),
    Field("delay", "int64", "", "policy steps", "rows locked to what was committed"),
    Field("executed", "int64", "", "policy steps", "d as it was: rows up to the next to come when it came"),
    Field("first_row", "int64", "", "", "the first row of its own, or why it was refused: timeline.REFUSALS"),
    Field("camera_age_ns", "int64", "", "ns", "capture of the oldest frame to the start of the inference"),
    Field("observe_ns", "int64", "", "ns", "frames and joints to network inputs"),
    Field("prefix_ns", "int64", "", "ns", "images, instruction and state to K/V"),
    Field("flow_ns", "int64", "", "ns", "all flow steps, gate included"),
    Field("publish_ns", "int64", "", "ns", "actions to joint targets in the loop's buffer"),
    Field("targets_rad", "float64", "C J", "rad", "as the policy gave them, row k due k periods after t0_ns"),
    Field("actions", "float32", "C A", "", "normalised unified actions"),
    Field("noise", "float32", "I C A", "", "that the sampler began from"),
    Field("directions", "float32", "K T M H", "", "that the gate was given"),
    Field("gate", "float32", "K T", "", "of each step of each refinement"),
    Field("cost", "float32", "K T", "", "that each gate came from"),
)

OBSERVATION = (
    Field("t_ns", "int64", "", "ns", "capture of its oldest frame, monotonic clock: the policy knows no later"),
    Field("captured_ns", "int64", "V", "ns", "capture of each view's frame, monotonic clock; its stamp in /camera"),
    Field("position_rad", "float64", "J", "rad", "the joints at t_ns"),
    Field("instruction", TEXT, "", "", "what the policy was asked to do"),
)

# Counts are since the process, or the machine, began: only differences mean anything.
MACHINE = (
    Field("t_ns", "int64", "", "ns", "of the sample, monotonic clock"),
    Field("resident_bytes", "int64", "", "bytes", "memory of the process"),
    Field("cpu_ns", "int64", "N", "ns", "on a processor"),
    Field("wait_ns", "int64", "N", "ns", "ready to run, and waiting for a processor"),
    Field("minor_faults", "int64", "N", "", "pages that had to be mapped"),
    Field("major_faults", "int64", "N", "", "pages that had to be read from a disk"),
    Field("sleeps", "int64", "N", "", "times the thread gave its processor up"),
    Field("preemptions", "int64", "N", "", "times it was made to"),
    Field("busy_ns", "int64", "", "ns", "of all processors together, running anything"),
    Field("stolen_ns", "int64", "", "ns", "of all processors together, lent by a hypervisor to another machine"),
    Field("load", "float64", "", "", "processes that want a processor, the mean of a minute"),
    Field("power_mode", "int64", "", "", "id, -1 where there is none"),
    Field("probes", "float64", "P", "`machine.units`", "clocks, temperatures, throttling; NaN where unknown"),
)

HEADER = (
    Field("format", "number", "", "", f"version of this table, {FORMAT}"),
    Field("started", TEXT, "", "ISO 8601", "wall clock, the only one in the log"),
    Field("started_ns", "number", "", "ns", "the same instant on the monotonic clock, which every other time is of"),
    Field("config", "object", "", "", "what the runtime was told, the robot's config in `robot`: all in effect"),
    Field("joints", "list", "", "", "names of J"),
    Field("cameras", "list", "", "", "names of V"),
    Field("sizes", "object", "", "", "what each letter is in this run"),
    Field("faults", "list", "", "", "names of the bits of /tick's `faults` and `seen`, from bit 0"),
    Field("mode", TEXT, "", "", "how chunks join: sync, async, locked or guided"),
    Field("policy_period_ns", "number", "", "ns", "between two rows of a chunk"),
    Field("rate_hz", "number", "", "Hz", "of the control loop"),
    Field("versions", "object", "", "", "Python, Onbeat and the packages that a timing or result may depend on"),
    Field("git_commit", TEXT, "", "", "of the checkout, with + when files differ; null when installed"),
    Field("backend", "object", "", "", "what the rounding of an inference depends on: flight/backend.py"),
    Field("machine", "object", "", "", "names of N and P, `units` of P, bounds of clocks, what does not change"),
    Field("bundle_sha256", TEXT, "", "", "of the bundle's manifest, which has the hash of every file; or null"),
    Field("calibration_sha256", TEXT, "", "", "of the calibration file; null without one"),
)

EVENT = (
    Field("t_ns", "number", "", "ns", "monotonic clock: the tick that showed it, or the first chunk of that kind"),
    Field("event", TEXT, "", "", "fault, fault_cleared, level, instruction, warning"),
    Field("name", TEXT, "", "", "of the fault or level; the instruction; what is wrong with the delay, or empty"),
)

OUTCOME = (
    Field("t_ns", "number", "", "ns", "monotonic clock"),
    Field("error", TEXT, "", "", "why the run ended early, or null"),
    Field("status", "object", "", "", "the last status of the run"),
    Field("faults", "object", "", "", "name: how often it began"),
    Field("bus", "object", "", "", "outcome: how many exchanges"),
    Field("refused_chunks", "object", "", "", "why: how many"),
    Field("real_time", "object", "", "", "what was asked of the operating system: got or not"),
    Field("warm_up_ns", "list", "", "ns", "how long each inference before the run took"),
    Field("dropped", "object", "", "", "topic: messages that did not get into this log"),
    Field("modules", "list", "", "", "that the process had imported"),
)

IMAGE_FIELDS = (
    Field("header.stamp", "time", "", "s, ns", "capture, middle of the exposure, monotonic clock"),
    Field("header.frame_id", TEXT, "", "", "the camera's name"),
    Field("format", TEXT, "", "", "png, which is lossless, or jpeg"),
    Field("data", "uint8", "", "", "the file"),
)

MESSAGES = (
    Message("/header", "Header", JSON, "What runs: the first message of every file.", HEADER),
    Message("/tick", "Tick", CDR, "One tick of the control loop.", TICK_RECORD + TICK_LOOP),
    Message("/chunk", "Chunk", CDR, "One inference, and what came of it.", CHUNK),
    Message("/observation", "Observation", CDR, "What an inference began from.", OBSERVATION),
    Message("/camera/", "CompressedImage", IMAGE, "A frame that an inference began from, per camera.", IMAGE_FIELDS),
    Message("/machine", "Machine", CDR, "The machine beside the loop, twice a second.", MACHINE),
    Message("/event", "Event", JSON, "What happened, when it happened.", EVENT),
    Message("/outcome", "Outcome", JSON, "How the run ended: the last message of a log that was closed.", OUTCOME),
)
BY_TOPIC = {message.topic: message for message in MESSAGES}
CAMERA = "/camera/"  # followed by the camera's name


def packed(fields: Iterable[Field], sizes: Mapping[str, int]) -> np.dtype[np.void]:
    """The record of the fields that are of fixed size, without padding; those of size 0 left out."""
    shaped = [(f.name, f.kind, shape_of(f, sizes)) for f in fields if f.kind != TEXT]
    return np.dtype([(name, np.dtype(kind), shape) for name, kind, shape in shaped if prod(shape)])


def shape_of(field: Field, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Its shape in a run."""
    return tuple(sizes[letter] for letter in field.shape.split())


def document() -> str:
    """docs/flight-log.md."""
    letters = "\n".join(f"- `{letter}`: {meaning}" for letter, meaning in LETTERS.items())
    sections = "\n".join(_section(message) for message in MESSAGES)
    return f"""# The flight log

Made by `python -m onbeat.runtime.flight.messages --write` from the table that writes and reads it; a test compares.

`onbeat run` writes a folder `log` of MCAP files, which Foxglove and Rerun open. Each file stands for itself: it begins
with /header, and is complete up to the last half second even when the machine is switched off. The oldest go when the
disk budget (`--log-budget-mb`) is used up. Log time and publish time of a message are when it is from, on the monotonic
clock. Messages are CDR with `ros2msg` schemas, little endian, of a size that is fixed in a run but for text; some are
JSON.

Letters of shapes, whose values are in the header's `sizes`; a field with a letter that is 0 is not there:

{letters}

{sections}"""


def _section(message: Message) -> str:
    name = f"{message.topic}NAME" if message.topic == CAMERA else message.topic
    how = {CDR: f"CDR, `{message.schema_name}`", JSON: "JSON", IMAGE: "CDR, `sensor_msgs/msg/CompressedImage`"}
    rows = "\n".join(_row(field) for field in message.fields)
    head = "| field | type | unit | meaning |\n|---|---|---|---|"
    return f"## {name}\n\n{message.meaning} {how[message.encoding]}.\n\n{head}\n{rows}\n"


def _row(field: Field) -> str:
    shape = f" ({', '.join(field.shape.split())})" if field.shape else ""
    return f"| `{field.name}` | {field.kind}{shape} | {field.unit} | {field.meaning} |"


def json_schema(message: Message) -> dict[str, Any]:
    """The JSON schema of a JSON message."""
    kinds: Mapping[str, Any] = {TEXT: ["string", "null"], "number": "number", "object": "object", "list": "array"}
    described = {f.name: {"type": kinds[f.kind], "description": _described(f)} for f in message.fields}
    return {"title": message.name, "description": message.meaning, "type": "object", "properties": described}


def _described(field: Field) -> str:
    return f"{field.unit}: {field.meaning}" if field.unit else field.meaning


def main(argv: Sequence[str] | None = None) -> int:
    """Print the document, or write it."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.runtime.flight.messages", description="The flight log.")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT} of the working directory")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
