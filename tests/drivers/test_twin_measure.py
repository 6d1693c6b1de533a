"""The table of figures is made of figures."""

import re

import pytest

pytest.importorskip("mujoco")
from onbeat.drivers.twin.measure import main


@pytest.mark.alone
@pytest.mark.slow
def test_every_line_has_percentiles_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "0.5"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"(un)?paced", line)]
    assert len(rows) == 3
    for row in rows:
        p50, p95, p99, longest = (int(figure) for figure in row[24:56].split())
        assert 0 < p50 <= p95 <= p99 <= longest
    unpaced, paced = (int(row[24:32]) for row in rows[:2])
    assert paced >= 1240 > 0, "124 bytes at 1 Mbaud take 1.24 ms"
    assert unpaced < paced
