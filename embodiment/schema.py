"""Find a robot: by name, by file, by what a published checkpoint calls it, or by what an observation contains."""

from collections.abc import Sequence
from pathlib import Path

from onbeat.embodiment.reader import parse_embodiment
from onbeat.embodiment.robot import ActionKey, Embodiment, EmbodimentError, Limits, StateKey
from onbeat.embodiment.slots import suggest

__all__ = [
    "ActionKey",
    "Embodiment",
    "EmbodimentError",
    "Limits",
    "StateKey",
    "embodiment_names",
    "find_embodiment",
    "load_embodiment",
    "observation_keys",
    "parse_embodiment",
]

DATA = Path(__file__).parent / "data"


def embodiment_names() -> list[str]:
    """The robots that come with this package."""
    return sorted(path.stem for path in DATA.glob("*.toml"))


def load_embodiment(name_or_path: str | Path) -> Embodiment:
    """A robot by its name, or from a TOML file of the same form. Raises EmbodimentError."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = DATA / f"{name_or_path}.toml"
        if path.stem not in embodiment_names():
            raise EmbodimentError(f"unknown embodiment '{name_or_path}': {suggest(path.stem, embodiment_names())}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EmbodimentError(f"{path} cannot be read ({error.strerror}): give an embodiment file") from None
    return parse_embodiment(text, path)


def find_embodiment(
    *, data_config: str | None = None, dataset: str | None = None, tag: str | None = None, keys: Sequence[str] = ()
) -> Embodiment:
    """The robot that a published checkpoint or a recorded observation means.

    Tried in turn: the data configuration, the embodiment tag, the dataset, and last the observation's key names
    ("video.top_view", "state.eef_position"; more than a robot needs is allowed). Raises EmbodimentError unless one.
    """
    robots = [load_embodiment(name) for name in embodiment_names()]
    for name, attribute in ((data_config, "data_configs"), (tag, "tags"), (dataset, "datasets")):
        named = [robot for robot in robots if name in getattr(robot, attribute)]
        if named:
            return _only(named, f"'{name}'")
    fitting = [robot for robot in robots if keys and set(observation_keys(robot)) <= set(keys)]
    largest = max((len(observation_keys(robot)) for robot in fitting), default=0)
    return _only([r for r in fitting if len(observation_keys(r)) == largest], f"an observation of {', '.join(keys)}")


def observation_keys(robot: Embodiment) -> tuple[str, ...]:
    """The names of its views and state keys as recorded observations spell them."""
    return (*(f"video.{view}" for view in robot.views), *(f"state.{key.name}" for key in robot.state))


def _only(robots: list[Embodiment], what: str) -> Embodiment:
    if len(robots) == 1:
        return robots[0]
    found = " and ".join(robot.name for robot in robots) or "none"
    raise EmbodimentError(f"{found} of the embodiments fits {what}: name one of {', '.join(embodiment_names())}")
