"""The benchmark of the balancers counts collective operations, and says what it measured."""

import json

import pytest

from benchmarks import balancers

PROGRAM = """
  %all-to-all.1 = f32[3,40]{1,0} all-to-all(f32[3,40]{1,0} %a), replica_groups={{0,1,2}}
  %pair = (bf16[8]{0}, s32[]) all-reduce(bf16[8]{0} %b, s32[] %c), to_apply=%add
  ROOT %sum = f32[] all-reduce-start(f32[] %d), to_apply=%add
  %done = f32[] all-reduce-done(f32[] %sum)
"""


def test_collective_operations_are_counted_with_the_bytes_of_their_results() -> None:
    found = balancers.collectives(PROGRAM)
    assert found == {"all-to-all": (1, 480), "all-reduce": (2, 16 + 4 + 4)}
    assert balancers.sent(found, 3) == (480 + 2 * 24) * 2 // 3


def test_tables_of_bytes_and_of_costs() -> None:
    rows = {"mean": {"collectives": {"all-reduce": (2, 24)}, "sent": 32}}
    rows["mgda"] = {"collectives": balancers.collectives(PROGRAM), "sent": 352}
    text = balancers.bytes_table({"size": "demo", "devices": 3, "shared_bytes": 4000, "methods": rows})
    assert "4,000 bytes of shared parameters" in text and "+320" in text
    machine = {"device": "cpu", "cores": 2, "jax": "0"}
    result = {"size": "tiny", "repeats": 3, "machine": machine, "mean_ms": 5.0, "over_mean": {"ngh": [1.01, 1.0, 1.1]}}
    assert "1.0100  [1.0000, 1.1000]" in balancers.costs_table(json.loads(json.dumps(result)))


def test_wrong_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        balancers.main(["--cost", "--repeats", "0"])
    assert "--repeats is 0, expected 1 or more" in capsys.readouterr().err
