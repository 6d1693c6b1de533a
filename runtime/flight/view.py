"""`onbeat view`: a flight log, or a run as it goes, in Rerun: cameras, joints, chunk fans, gate, latency, faults.

Needs the package rerun-sdk, of the extra `view`; nothing else of Onbeat does.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.flight.encoding import Encoded, Layout, decode, layout_of, split_frame
from onbeat.runtime.flight.messages import CAMERA, CDR, CHUNK_STAGES, MESSAGES
from onbeat.runtime.flight.reader import log_files, read_messages, version_problems
from onbeat.runtime.flight.view_pipe import read_pipe
from onbeat.runtime.measures import text_table

TIMELINE: Final = "run"  # since the header's started_ns
LIVE: Final = "live"  # the target of a viewer on this screen
REMOTE: Final = ("rerun+http://", "rerun+https://")
BATCH: Final = 20  # ticks that are shown together: ten times a second at 200 Hz
FANS: Final = 4  # chunks that are told apart, by their id
SHOWN_S: Final = (-8, 2)  # of the plots, from the newest; rows of chunks lie ahead
GOAL, MEASURED = (230, 80, 60), (60, 120, 230)
FAN_COLORS: Final = ((170, 170, 170), (140, 180, 140), (190, 160, 200), (200, 180, 120))
LOUD: Final = {"fault": "WARN", "warning": "WARN", "fault_cleared": "INFO", "level": "INFO"}
NICE: Final = 10


class ViewRefused(OnbeatError):
    """There is nothing to look with, or nowhere to look."""


def check_target(target: str) -> None:
    """Refuse, before anything moves, a view that cannot be. Raises ViewRefused. target: as `open_stream` takes it."""
    if importlib.util.find_spec("rerun") is None:
        raise ViewRefused("the view needs the package 'rerun-sdk': run `pip install 'onbeat[view]'`")
    if target == LIVE and sys.platform == "linux" and not (os.getenv("DISPLAY") or os.getenv("WAYLAND_DISPLAY")):
        raise ViewRefused(
            "there is no screen to view on: give a file (--view run.rrd), or the address of a viewer elsewhere "
            "(`rerun` there, then --view rerun+http://HOST:9876/proxy)"
        )
    if target != LIVE and not target.startswith(REMOTE) and not target.endswith(".rrd"):
        raise ViewRefused(f"a view goes into a file that ends in .rrd, or to {REMOTE[0]}HOST:9876/proxy, not {target}")


def open_stream(target: str, header: Mapping[str, Any]) -> Any:
    """A Rerun recording on LIVE, on an address of REMOTE, or into a file."""
    import rerun as rr

    stream, layout = rr.RecordingStream("onbeat"), blueprint(header)
    if target == LIVE:
        stream.spawn(memory_limit="2GB", default_blueprint=layout)
    elif target.startswith(REMOTE):
        stream.connect_grpc(target, default_blueprint=layout)
    else:
        stream.save(target, default_blueprint=layout)
    return stream


def blueprint(header: Mapping[str, Any]) -> Any:
    """What lies where."""
    import rerun.blueprint as rrb

    begin, end = (rrb.TimeRangeBoundary.cursor_relative(seconds=at) for at in SHOWN_S)
    ranges = rrb.VisibleTimeRanges([rrb.VisibleTimeRange(TIMELINE, start=begin, end=end)])

    def plot(origin: str, name: str) -> Any:
        return rrb.TimeSeriesView(origin=origin, name=name, time_ranges=ranges)

    cameras = [rrb.Spatial2DView(origin=f"camera/{name}", name=name) for name in header["cameras"]]
    joints = [plot(f"joints/{joint}", f"{joint}, rad") for joint in header["joints"]]
    gate = [plot("gate", "gate")] if header["sizes"]["K"] else []
    below = rrb.Horizontal(plot("latency", "latency, ms"), plot("loop", "loop, ms"), *gate)
    left = rrb.Vertical(*cameras, rrb.TextLogView(origin="events", name="events"))
    right = rrb.Vertical(rrb.Grid(*joints), below, row_shares=[2, 1])
    return rrb.Blueprint(rrb.Horizontal(left, right, column_shares=[1, 3]), collapse_panels=True)


class View:
    """Shows messages of one run in their order. layouts: of its CDR topics."""

    def __init__(self, stream: Any, header: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
        self._stream, self._layouts = stream, layouts
        self._joints: Sequence[str] = header["joints"]
        self._started_ns, self._period_ns = int(header["started_ns"]), int(header["policy_period_ns"])
        self._ticks: list[bytes] = []
        self._style()

    def show(self, item: Encoded) -> None:
        """One message; of ticks, those that wait once there are BATCH."""
        if item.topic == "/tick":
            self._ticks.append(item.message)
            if len(self._ticks) >= BATCH:
                self.flush()
        elif item.topic == "/chunk":
            self._show_chunk(decode(self._layouts["/chunk"], [item.message]))
        elif item.topic == "/event":
            self._show_event(json.loads(item.message), item.t_ns)
        elif item.topic.startswith(CAMERA):
            self._show_frame(item)

    def flush(self) -> None:
        """Show the ticks that wait."""
        if self._ticks:
            self._show_ticks(decode(self._layouts["/tick"], self._ticks))
            self._ticks.clear()

    def close(self) -> None:
        """Show what waits; nothing is shown after it."""
        self.flush()
        self._stream.flush()
        self._stream.disconnect()

    def _style(self) -> None:
        import rerun as rr

        for joint in self._joints:
            self._fix(f"joints/{joint}/goal", rr.SeriesLines(colors=GOAL, names="goal"))
            self._fix(f"joints/{joint}/measured", rr.SeriesLines(colors=MEASURED, names="measured"))
            for fan, color in enumerate(FAN_COLORS):
                points = rr.SeriesPoints(colors=color, names=f"chunk {fan} of {FANS}", marker_sizes=1.5)
                self._fix(f"joints/{joint}/chunk{fan}", points)

    def _fix(self, entity: str, archetype: Any) -> None:
        self._stream.log(entity, archetype, static=True)

    def _plot(self, entity: str, t_ns: NDArray[np.int64], values: NDArray[Any]) -> None:
        import rerun as rr

        times = rr.TimeColumn(TIMELINE, duration=(t_ns - self._started_ns).astype("timedelta64[ns]"))
        self._stream.send_columns(entity, indexes=[times], columns=rr.Scalars.columns(scalars=values))

    def _show_ticks(self, ticks: NDArray[np.void]) -> None:
        due_ns = ticks["due_ns"]
        for k, joint in enumerate(self._joints):
            self._plot(f"joints/{joint}/goal", due_ns, ticks["goal_rad"][:, k])
            self._plot(f"joints/{joint}/measured", due_ns, ticks["position_rad"][:, k])
        self._plot("loop/lateness", due_ns, (ticks["start_ns"] - due_ns) / 1e6)
        self._plot("loop/exchange", due_ns, ticks["exchange_ns"] / 1e6)
        self._plot("loop/reaction_level", due_ns, ticks["level"])

    def _show_chunk(self, chunks: NDArray[np.void]) -> None:
        chunk, at_ns = chunks[0], chunks["published_ns"]
        for stage in CHUNK_STAGES:
            self._plot(f"latency/{stage}", at_ns, chunks[f"{stage}_ns"] / 1e6)
        self._plot("latency/frame_to_chunk", at_ns, (at_ns - chunks["observed_ns"]) / 1e6)
        for name in ("gate", "cost"):
            if name in (chunks.dtype.names or ()):
                self._plot(f"gate/{name}", at_ns, chunks[name].mean(axis=(1, 2)))
        if chunk["chunk_id"] >= 0:
            due_ns = chunk["t0_ns"] + np.arange(chunk["rows"]) * self._period_ns
            for k, joint in enumerate(self._joints):
                targets = chunk["targets_rad"][: chunk["rows"], k]
                self._plot(f"joints/{joint}/chunk{chunk['chunk_id'] % FANS}", due_ns, targets)

    def _at(self, t_ns: int) -> None:
        self._stream.set_time(TIMELINE, duration=np.timedelta64(t_ns - self._started_ns, "ns"))

    def _show_event(self, event: Mapping[str, Any], t_ns: int) -> None:
        import rerun as rr

        self._at(t_ns)
        text = f"{event['event'].replace('_', ' ')}: {event['name'] or 'none'}"
        self._stream.log("events", rr.TextLog(text, level=LOUD.get(event["event"], "INFO")))

    def _show_frame(self, item: Encoded) -> None:
        import rerun as rr

        t_ns, form, data = split_frame(item.message)
        self._at(t_ns)
        self._stream.log(item.topic.strip("/"), rr.EncodedImage(contents=data, media_type=f"image/{form}"))


def show_all(items: Iterable[Encoded], target: str, layouts: Mapping[str, Layout] | None = None) -> Mapping[str, int]:
    """Everything, from the header on, to the target. layouts: None for those of this version.

    Returns topic -> messages that were there. Raises ViewRefused when there is no header.
    """
    view: View | None = None
    count: Counter[str] = Counter()
    for item in items:
        count[item.topic] += 1
        if item.topic == "/header" and view is None:
            header = json.loads(item.message)
            known = layouts_of(header) if layouts is None else layouts
            view = View(open_stream(target, header), header, known)
        elif view is not None:
            view.show(item)
    if view is None:
        raise ViewRefused("there is no header: nothing can be shown of this log")
    view.close()
    return count


def layouts_of(header: Mapping[str, Any]) -> dict[str, Layout]:
    """Of a run of this version."""
    return {m.topic: layout_of(m, header["sizes"]) for m in MESSAGES if m.encoding == CDR}


def logged(path: Path, problems: list[str], layouts: dict[str, Layout]) -> Iterator[Encoded]:
    """The messages of a log, file by file. problems, layouts: as of `reader.read_messages`."""
    for k, file in enumerate(log_files(path)):
        for topic, message in read_messages(file, problems, layouts):
            if topic == "/header" and k == 0:
                problems += version_problems(json.loads(message.data))
            yield Encoded(topic, message.data, message.log_time)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="onbeat view",
        description="Look at a flight log in Rerun: cameras, joints, chunks, gate, latency, faults.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("log", type=Path, nargs="?", help="folder of a run, its log, or one file of it")
    parser.add_argument("--to", default=LIVE, help=f"{LIVE}, a file that ends in .rrd, or {REMOTE[0]}HOST:9876/proxy")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print what was there as JSON")
    parser.add_argument("--follow", metavar="TO", help=argparse.SUPPRESS)  # the other end of a ViewPipe
    options = parser.parse_args(argv)
    if options.log is None and options.follow is None:
        parser.error("give the folder of a run")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, also for a log of which only a part could be shown."""
    options = parse(argv)
    if options.follow is not None:
        os.nice(NICE)
        show_all(read_pipe(sys.stdin.buffer), options.follow)
        return 0
    check_target(options.to)
    problems, layouts = list[str](), dict[str, Layout]()
    try:
        shown = show_all(logged(options.log, problems, layouts), options.to, layouts)
    except ViewRefused as refusal:
        raise ViewRefused("; ".join((str(refusal), *problems))) from None
    if options.is_json:
        print(json.dumps({"shown": shown, "problems": problems}))
        return 0
    print(text_table(("topic", "messages"), [(topic, str(count)) for topic, count in sorted(shown.items())]))
    for problem in problems:
        print(f"onbeat view: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
