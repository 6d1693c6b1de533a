import json
import sys
from dataclasses import replace

import pytest

from onbeat.runtime import doctor
from onbeat.runtime.doctor import FAILED, OK, OPTIONAL, Facts, Package, Port, Probe

HEALTHY = Facts(
    python=(3, 11, 2),
    packages=(
        Package("numpy", "", "1.26", "2.1.0"),
        Package("mujoco", "sim", "3.3", "4.0.0"),
        Package("tomli", "", "2", "2.0.1", conditional=True),
    ),
    rendering=Probe("112x112x3"),
    gl_libraries={"EGL": True, "OSMesa": True},
    ports=(Port("/dev/ttyACM0", accessible=True),),
    fifo=True,
    memlock_bytes=-1,
    cores=4,
    governor="performance",
    providers=("CPUExecutionProvider",),
    jetson=None,
    power_mode=None,
    bundles={"bundle": Probe("loads")},
)


def states(facts):
    return {check.name: check.state for check in doctor.judge(facts)}


def test_a_healthy_machine_passes_with_nothing_to_mend():
    checks = doctor.judge(HEALTHY)
    assert {check.state for check in checks} == {OK}
    assert not any(check.remedy for check in checks)
    assert doctor.exit_code(checks) == 0


REQUIRED = {
    "python too old": ("python", {"python": (3, 9, 19)}),
    "python too new": ("python", {"python": (3, 13, 0)}),
    "package missing": ("numpy [robot]", {"packages": (Package("numpy", "", "1.26", None),)}),
    "package too old": ("numpy [robot]", {"packages": (Package("numpy", "", "1.26", "1.9.9"),)}),
    "extra too old": ("mujoco [sim]", {"packages": (Package("mujoco", "sim", "3.3", "3.2.7"),)}),
    "rendering broken": ("rendering [sim]", {"rendering": Probe("", "no EGL device")}),
    "port forbidden": ("serial port", {"ports": (Port("/dev/ttyACM0", accessible=False),)}),
    "no provider": ("onnxruntime providers", {"providers": ()}),
    "no onnxruntime": ("onnxruntime providers", {"providers": None}),
    "bundle broken": ("bundle", {"bundles": {"bundle": Probe("", "flow.onnx was changed")}}),
    "bundle of ours broken": ("bundle", {"bundles": {"bundle": Probe("", "flow.onnx was changed: export it again")}}),
}


@pytest.mark.parametrize("fault", REQUIRED)
def test_a_required_thing_that_is_missing_fails_and_says_the_remedy(fault):
    name, change = REQUIRED[fault]
    checks = doctor.judge(replace(HEALTHY, **change))
    broken = [check for check in checks if check.state == FAILED]
    assert [check.name for check in broken] == [name]
    assert broken[0].remedy
    assert doctor.as_text(checks).splitlines()[checks.index(broken[0])].endswith(broken[0].remedy)
    assert doctor.exit_code(checks) == 1


OPTIONALS = {
    "extra not installed": ("mujoco [sim]", {"packages": (Package("mujoco", "sim", "3.3", None),)}),
    "only on some machines": ("cuda [robot]", {"packages": (Package("cuda", "", "2", None, conditional=True),)}),
    "no simulator": ("rendering [sim]", {"rendering": None}),
    "no EGL": ("EGL [sim]", {"gl_libraries": {"EGL": False}}),
    "no arm": ("serial port", {"ports": ()}),
    "no SCHED_FIFO": ("real-time scheduling", {"fifo": False}),
    "little locked memory": ("locked memory", {"memlock_bytes": 65536}),
    "one core": ("cores", {"cores": 1}),
    "slow governor": ("cpu governor", {"governor": "powersave"}),
    "no bundle": ("bundle", {"bundles": {}}),
    "jetson without nvpmodel": ("jetson power mode", {"jetson": "# R36 (release), REVISION: 4.3"}),
}


@pytest.mark.parametrize("lack", OPTIONALS)
def test_an_optional_thing_that_is_missing_is_named_with_its_remedy_and_passes(lack):
    name, change = OPTIONALS[lack]
    checks = doctor.judge(replace(HEALTHY, **change))
    lacking = [check for check in checks if check.state != OK]
    assert [(check.name, check.state) for check in lacking] == [(name, OPTIONAL)]
    assert lacking[0].remedy
    assert doctor.exit_code(checks) == 0


def test_a_broken_bundle_has_one_remedy_its_own_where_it_has_one():
    broken = {"one": Probe("", "flow.onnx was changed: export it again"), "two": Probe("", "no such file")}
    checks = {check.found: check.remedy for check in doctor.judge(replace(HEALTHY, bundles=broken)) if check.remedy}
    assert checks == {
        "one: flow.onnx was changed": "export it again",
        "two: no such file": "run `onbeat export CHECKPOINT two --replace`",
    }


def test_gl_remedy_names_the_packages():
    checks = doctor.judge(replace(HEALTHY, gl_libraries={"EGL": True, "OSMesa": False}))
    assert next(c for c in checks if c.name == "OSMesa [sim]").remedy == "run `apt-get install libosmesa6`"


def test_an_adjustable_governor_is_not_asked_of_a_machine_without_one():
    assert states(replace(HEALTHY, governor=None))["cpu governor"] == OK


def test_jetson_lines_only_on_a_jetson():
    on_board = states(replace(HEALTHY, jetson="# R36 (release)", power_mode="NV Power Mode: MAXN 0"))
    assert on_board["jetson release"] == on_board["jetson power mode"] == OK
    assert not any("jetson r" in name for name in states(HEALTHY))


def test_json_has_the_same_checks():
    checks = doctor.judge(replace(HEALTHY, fifo=False))
    document = json.loads(doctor.as_json(checks))
    assert document["ok"] is True
    assert [set(entry) for entry in document["checks"]] == [{"name", "state", "found", "remedy"}] * len(checks)
    assert [entry["name"] for entry in document["checks"]] == [check.name for check in checks]


def test_requirements_are_read_from_metadata():
    lines = [
        "numpy>=1.26",
        'mujoco>=3.3; extra == "sim"',
        "cuda-x; platform_machine == 'aarch64'",
        "no-such-package-xyz",
    ]
    numpy, mujoco, cuda, absent = doctor.required_packages(lines)
    assert (numpy.name, numpy.extra, numpy.minimum, numpy.conditional) == ("numpy", "", "1.26", False)
    assert numpy.installed is not None
    assert cuda.conditional
    assert (mujoco.extra, mujoco.minimum) == ("sim", "3.3")
    assert (absent.minimum, absent.installed) == ("0", None)


@pytest.mark.parametrize(("bound", "kept"), [("3.10", 0), ("3.99", 1)])
def test_requirements_of_older_pythons_are_left_out(bound, kept):
    assert len(doctor.required_packages([f"tomli>=2; python_version < '{bound}'"])) == kept


def test_without_an_installed_package_the_package_itself_is_missing(monkeypatch):
    def nothing(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", nothing)
    monkeypatch.setattr(doctor.importlib.metadata, "version", nothing)
    (only,) = doctor.required_packages(doctor._own_requirements())
    assert (only.name, only.installed, only.extra) == ("onbeat", None, "")


def test_local_versions_compare_by_their_numbers():
    facts = replace(HEALTHY, packages=(Package("torch", "train", "2.6", "2.13.0+cpu"),))
    assert states(facts)["torch [train]"] == OK


def test_a_renderer_that_aborts_is_a_line_and_not_an_abort():
    assert doctor.probe_rendering("import os; os.abort()").error == "exit -6"
    assert doctor.probe_rendering("raise RuntimeError('no GL')").error == "RuntimeError: no GL"
    assert doctor.probe_rendering("print('1x1')") == Probe("1x1")
    assert "within" in doctor.probe_rendering("import time; time.sleep(9)", timeout_s=0.2).error


def test_main_exits_by_the_verdict(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda _: HEALTHY)
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    monkeypatch.setattr(doctor, "gather", lambda _: replace(HEALTHY, python=(3, 9, 0)))
    assert doctor.main([]) == 1
    assert "1 required missing" in capsys.readouterr().out


@pytest.mark.slow
def test_this_machine_can_be_looked_at():
    facts = doctor.gather()
    assert facts.python == sys.version_info[:3]
    assert facts.cores >= 1
    assert next(p for p in facts.packages if p.name == "numpy").installed
