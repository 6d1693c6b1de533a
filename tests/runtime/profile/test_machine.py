"""The machine sampler, on this machine and on trees written after what is documented of Jetsons; none was tried."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest

from onbeat.runtime.profile.board import describe, find_probes, power_mode
from onbeat.runtime.profile.machine import MachineSampler
from onbeat.runtime.profile.process import ProcessUsage, read_task

ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 1, BOARD: generic\nmore",
    "var/lib/nvpmodel/status": "pmode:0002\nfmode:quiet",
    "etc/nvpmodel.conf": "# < POWER_MODEL ID=2 NAME=OLD >\n< POWER_MODEL ID=0 NAME=15W >\nA B 1\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1728000",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "115200",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "729600",
    "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000",
    "sys/class/devfreq/17000000.gpu/min_freq": "1020000000",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    "sys/class/devfreq/17000000.gpu/governor": "nvhost_podgov",
    "sys/class/devfreq/17000000.gpu/device/load": "345",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "51687",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone2/temp": "-256000",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": "1",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "813",
    "sys/class/hwmon/hwmon2/rpm": "1786",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "19700",
    "sys/class/hwmon/hwmon1/curr1_input": "500",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon1/in7_input": "3200",
}
ORIN_NX = ORIN_NANO | {
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=2 NAME=15W >\n< POWER_MODEL ID=3 NAME=25W >",
    "var/lib/nvpmodel/status": "pmode:0003",
}
AGX_ORIN = {  # JetPack 5: the GPU and the zones have their older names
    "proc/device-tree/model": "Jetson AGX Orin Developer Kit\0",
    "var/lib/nvpmodel/status": "pmode:0000",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >",
    "sys/class/devfreq/17000000.ga10b/cur_freq": "1300500000",
    "sys/class/thermal/thermal_zone0/type": "CPU-therm",
    "sys/class/thermal/thermal_zone0/temp": "45000",
    "sys/class/thermal/thermal_zone10/type": "tj-therm",
    "sys/class/thermal/thermal_zone10/temp": "47000",
    "sys/class/thermal/thermal_zone9/type": "Tboard_tegra",
    "sys/class/thermal/thermal_zone9/temp": "38000",
}
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "var/lib/nvpmodel/status": "pmode:0001",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1000000000",
    "sys/class/devfreq/bwmgr/cur_freq": "4266000000",
    "sys/class/thermal/thermal_zone0/type": "soc012-thermal",
    "sys/class/thermal/thermal_zone0/temp": "55100",
    "sys/class/hwmon/hwmon0/name": "ina238",
    "sys/class/hwmon/hwmon0/in1_label": "VIN",
    "sys/class/hwmon/hwmon0/power1_input": "150000000",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def readings(root: Path) -> dict[str, float | None]:
    return {probe.title: probe.read() for probe in find_probes(root)}


def test_a_machine_that_says_nothing_is_no_error(tmp_path: Path):
    sampler = MachineSampler(["loop"], tmp_path)
    sample = sampler.sample()
    assert sampler.names == {"threads": ["loop", "other"], "probes": [], "units": []}
    assert (sample.resident_bytes, sample.power_mode, sample.busy_ns, len(sample.probes)) == (-1, -1, -1, 0)
    assert math.isnan(sample.load)
    assert sample.cpu_ns.tolist() == [0, 0]
    assert set(describe(tmp_path).values()) == {None}


@pytest.mark.parametrize("text", ["", "abc", "\0"])
def test_a_file_without_a_number_is_unknown(tmp_path: Path, text: str):
    write_tree(tmp_path, {"sys/class/thermal/thermal_zone0/temp": text, "var/lib/nvpmodel/status": text})
    assert readings(tmp_path) == {"temperature thermal_zone0": None}
    assert power_mode(tmp_path) is None
    assert np.isnan(MachineSampler([], tmp_path).sample().probes).all()


def test_a_file_that_may_not_be_read_is_unknown(tmp_path: Path):
    (tmp_path / "sys/class/devfreq/bwmgr/cur_freq").mkdir(parents=True)
    assert readings(tmp_path) == {"emc clock bwmgr": None}


def test_orin_nano(tmp_path: Path):
    root = write_tree(tmp_path, ORIN_NANO)
    assert readings(root) == {
        "cpu clock policy0": 1.728e9,
        "cpu clock policy4": 729.6e6,
        "gpu clock 17000000.gpu": 1.02e9,
        "gpu load 17000000.gpu": pytest.approx(34.5),
        "emc clock emc": 3.199e9,
        "temperature cpu-thermal": pytest.approx(51.687),
        "temperature cv0-thermal": None,
        "throttling gpu-throttle-alert": 1.0,
        "over-current oc1": 0.0,
        "over-current oc3": 813.0,
        "fan hwmon2": 1786.0,
        "power VDD_IN": pytest.approx(9.85),
    }
    about = MachineSampler([], root).about()
    assert about["power_mode"] == "MAXN_SUPER"
    assert about["model"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert about["release"] == "# R36 (release), REVISION: 4.7, GCID: 1, BOARD: generic"
    assert (about["cpu_governor"], about["gpu_governor"]) == ("schedutil", "nvhost_podgov")
    assert about["bounds"]["gpu clock 17000000.gpu"] == (1.02e9, 1.02e9)


@pytest.mark.parametrize(
    ("tree", "mode", "expected"),
    [
        (ORIN_NX, "25W", {"gpu clock 17000000.gpu": 1.02e9, "power VDD_IN": pytest.approx(9.85)}),
        (AGX_ORIN, "MAXN", {"gpu clock 17000000.ga10b": 1.3005e9, "temperature tj-therm": 47.0}),
        (THOR, "120W", {"gpu clock gpu-gpc-0": 1.575e9, "emc clock bwmgr": 4.266e9, "power VIN": 150.0}),
    ],
)
def test_other_boards(tmp_path: Path, tree: dict[str, str], mode: str, expected: dict[str, float]):
    root = write_tree(tmp_path, tree)
    assert describe(root)["power_mode"] == mode
    assert expected.items() <= readings(root).items()


def test_zones_stand_in_the_order_of_their_numbers(tmp_path: Path):
    titles = list(readings(write_tree(tmp_path, AGX_ORIN)))
    assert titles[1:] == ["temperature CPU-therm", "temperature Tboard_tegra", "temperature tj-therm"]


def test_two_sensors_of_one_name_are_two(tmp_path: Path):
    for zone in "01":
        folder = f"sys/class/thermal/thermal_zone{zone}"
        write_tree(tmp_path, {f"{folder}/type": "acpitz", f"{folder}/temp": "30000"})
    assert list(readings(tmp_path)) == ["temperature acpitz", "temperature acpitz #2"]


SWITCHES = "voluntary_ctxt_switches:\t4\nnonvoluntary_ctxt_switches:\t9"


def task_tree(root: Path, number: int, *, cpu_ns: int, name: str = "a) b (c") -> None:
    stat = f"{number} ({name}) S " + " ".join(["0"] * 6 + ["7", "0", "2", "0", "30", "12"] + ["0"] * 30)
    files = {"stat": stat, "schedstat": f"{cpu_ns} 5 1", "status": SWITCHES}
    write_tree(root / "task" / str(number), files)


def test_a_threads_counters(tmp_path: Path):
    task_tree(tmp_path, 12, cpu_ns=1000)
    assert read_task(tmp_path / "task/12") == (1000, 5, 7, 2, 4, 9)
    (tmp_path / "task/12/schedstat").unlink()
    assert read_task(tmp_path / "task/12") == (420_000_000, 0, 7, 2, 4, 9)
    assert read_task(tmp_path / "task/13") is None


def test_what_an_ended_thread_used_stays_counted(tmp_path: Path):
    usage = ProcessUsage(["loop"], tmp_path)
    task_tree(tmp_path, 12, cpu_ns=1000)
    task_tree(tmp_path, 13, cpu_ns=50)
    assert usage.read({12: "loop", 13: "unheard of"}).cpu_ns.tolist() == [1000, 50]
    for file in (tmp_path / "task/12").iterdir():
        file.unlink()
    (tmp_path / "task/12").rmdir()
    task_tree(tmp_path, 13, cpu_ns=80)
    assert usage.read({}).cpu_ns.tolist() == [1000, 80]


def test_this_process_is_measured():
    sampler = MachineSampler(["worker"])
    done = threading.Event()
    worker = threading.Thread(target=lambda: [sum(range(1000)) for _ in range(2000)] and done.wait(), name="worker")
    before = sampler.sample()
    worker.start()
    while sampler.sample().cpu_ns[0] == 0:
        pass
    after = sampler.sample()
    done.set()
    worker.join()
    assert after.t_ns > before.t_ns
    assert after.cpu_ns[0] > 0 == before.cpu_ns[0]
    assert (after.cpu_ns >= before.cpu_ns).all()
    assert after.resident_bytes > 1_000_000
    assert sampler.about()["cores"] >= 1
