"""The benchmark of the balancers runs and says what it measured; no figure is asserted to be fast."""

import json

import pytest

from benchmarks import harmonize


@pytest.mark.slow
def test_the_balancers_alone(capsys):
    assert harmonize.main(["--alone", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["balancer_ms"]) == {"plain mean", "recorded mean", "ngh", "pcgrad", "gradnorm"}
    assert all(ms > 0 for ms in result["balancer_ms"].values()) and result["group_summary_ms"] > 0
    assert "step_ms" not in result and result["shared_tensors"] > 100
