"""The benchmark of convolutions runs on a small cloud and prints what it says it does; no time is tested."""

import json

import numpy as np
import pytest

from benchmarks import convolution, scans, spconv_cpu, timing


@pytest.fixture(scope="module")
def small_scan(tmp_path_factory):
    """A corner of three walls, 6 cm wide."""
    grid = np.stack(np.meshgrid(*[np.arange(7)] * 3, indexing="ij"), -1).reshape(-1, 3)
    walls = grid[(grid == 0).any(1)] * 0.01 + 0.005
    path = tmp_path_factory.mktemp("scan") / "corner.bin"
    np.concatenate([walls, np.zeros_like(walls)], 1).astype(np.float32).tofile(path)
    return path


def run(capsys, *arguments):
    status = convolution.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_numbers_of_every_layer(small_scan, capsys, monkeypatch):
    monkeypatch.setattr(spconv_cpu, "MISSING", "spconv is left out")
    names = ["stem", "stage1.residual", "up0.generate"]
    algorithms = ["auto", "winograd", "pairs"]
    status, out, err = run(
        capsys, "--scan", small_scan, "--json", "--repeats", 1, "--layers", *names, "--algorithms", *algorithms
    )
    assert status == 0
    assert "spconv is left out" in err
    result = json.loads(out)
    assert result["scan"] == {"name": "corner.bin", "points": 127, "voxels": 127, "voxel_size": 0.01}
    assert result["matmul_gflops"] > 0
    assert [layer["name"] for layer in result["layers"]] == names
    assert [layer["channels"] for layer in result["layers"]] == [[3, 64], [64, 64], [128, 128]]
    assert [layer["times"] for layer in result["layers"]] == [1, 5, 1]
    for layer in result["layers"]:
        expected = {"auto", "pairs"} | ({"winograd"} if layer["kind"] == "submanifold" else set())
        for direction, work in (("forward", 2), ("forward_backward", 6)):
            assert set(layer[direction]) == expected
            for times in layer[direction].values():
                rate = work * layer["pairs"] * np.prod(layer["channels"]) / (1e-3 * times["ms"]) / 1e9
                assert times["gflops"] == pytest.approx(rate)
        assert 0 < layer["fill"] <= 1
        assert layer["auto_over_spconv"] is None
    assert result["slower_than_spconv"] == []


def test_layers_are_those_of_the_detector(small_scan):
    config = convolution.DetectorConfig()
    _, points = scans.load_points(small_scan)
    tables = convolution.detector_tables(convolution.sparse.voxelize([points], 0.01).sites)
    layers = list(convolution.detector_layers(config, tables, convolution.pad_plan(tables, tables.sizes)))
    assert sum(layer.times for layer in layers) == 1 + 2 * sum(config.stage_blocks) + 4 + 2 * 3
    for layer in layers:
        assert layer.kernel_map.in_capacity >= len(layer.table.inputs)
        assert layer.kernel_map.kernel_volume == len(layer.table.rows)
        assert layer.kernel_map.kind == layer.table.kind


def test_the_table_and_the_last_line(small_scan, capsys, monkeypatch):
    monkeypatch.setattr(spconv_cpu, "MISSING", "spconv is left out")
    status, out, _ = run(
        capsys, "--scan", small_scan, "--repeats", 1, "--layers", "stage1.skip", "--algorithms", "auto", "tiles"
    )
    assert status == 0
    rows = [line for line in out.splitlines() if line.startswith("stage1.skip")]
    assert len(rows) == 2
    assert out.splitlines()[-1].startswith("auto was not compared with spconv on submanifold layers")


@pytest.mark.parametrize("rival", [1.0, 9.0])
def test_slower_layers_are_named(rival):
    layer = {"kind": "submanifold", "channels": [64, 128], "sites": [2001, 2001], "auto_over_spconv": 3.0 / rival}
    others = [
        {**layer, "name": "strided", "kind": "strided"},
        {**layer, "name": "narrow", "channels": [32, 64]},
        {**layer, "name": "small", "sites": [2000, 2000]},
        {**layer, "name": "alone", "auto_over_spconv": None},
    ]
    named = convolution.slower_than_spconv([{**layer, "name": "wide"}, *others])
    assert named == (["wide"] if rival == 1.0 else [])


def test_spconv_computes_the_same(small_scan, capsys):
    if spconv_cpu.MISSING:
        pytest.skip(spconv_cpu.MISSING)
    names = ["stem", "stage1.down", "stage1.skip", "stage1.residual", "up0.generate"]
    status, out, _ = run(
        capsys, "--scan", small_scan, "--json", "--repeats", 1, "--layers", *names, "--algorithms", "auto"
    )
    assert status == 0
    for layer in json.loads(out)["layers"]:
        assert 0 <= layer["difference_from_spconv"] < 1e-5
        assert layer["auto_over_spconv"] > 0


def test_what_cannot_be_run_is_said(small_scan, capsys, tmp_path):
    assert run(capsys, "--scan", tmp_path / "none.bin")[0] == 2
    (tmp_path / "odd.bin").write_bytes(b"\0" * 20)
    status, _, err = run(capsys, "--scan", tmp_path / "odd.bin")
    assert status == 2 and "rows of six float32" in err
    status, _, err = run(capsys, "--scan", small_scan, "--layers", "stage9")
    assert status == 2 and "no layer is called stage9" in err


def test_rivals_take_turns():
    calls = []
    seconds = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, calls=3)
    assert calls == (["a"] * 4 + ["b"] * 4) * 2
    assert set(seconds) == {"a", "b"}


def test_points_of_ply_files(tmp_path):
    points = np.array([[0.5, -1.0, 2.0], [3.0, 4.25, -5.0]], np.float32)
    header = "ply\nformat {} 1.0\nelement vertex 2\nproperty uchar red\nproperty float x\nproperty float y\n"
    header += "property double z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    rows = np.zeros(2, np.dtype([("red", "u1"), ("x", "<f4"), ("y", "<f4"), ("z", "<f8")]))
    for axis, column in zip("xyz", points.T, strict=True):
        rows[axis] = column
    (tmp_path / "binary.ply").write_bytes(header.format("binary_little_endian").encode() + rows.tobytes() + b"\3rest")
    text = "".join(f"7 {x} {y} {z}\n" for x, y, z in points.tolist())
    (tmp_path / "text.ply").write_text(header.format("ascii") + text + "3 0 1 1\n")
    for name in ("binary.ply", "text.ply"):
        found, read = scans.load_points(tmp_path / name)
        assert found == name
        np.testing.assert_array_equal(read, points)
