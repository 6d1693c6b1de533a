"""A wheel carries every module and data file of every area, and works with no checkout around."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AREAS = ("embodiment", "kernels", "drivers", "calibration", "runtime", "training", "export")
CARRIED = {".py", ".toml", ".xml", ".html", ".md"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def tracked(area: str) -> set[str]:
    listing = subprocess.run(["git", "ls-files", area], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {f"onbeat/{name}" for name in listing.split() if Path(name).suffix in CARRIED}


def test_every_tracked_file_of_an_area_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for area in AREAS:
        files = tracked(area)
        assert files, area
        assert files <= names, sorted(files - names)


def test_tests_and_bundles_stay_out(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"onbeat"}


def test_an_installed_onbeat_needs_no_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path[:0] = {[str(tmp_path), *site_folders()]!r}; "
        "import onbeat.runtime.tick, onbeat.embodiment.schema as s; "
        f"assert s.__file__.startswith({str(tmp_path)!r}), s.__file__; print(len(s.embodiment_names()))"
    )
    result = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 9


def site_folders() -> list[str]:
    return [p for p in sys.path if p.endswith("site-packages")]
