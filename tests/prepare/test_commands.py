"""The commands `python -m data.<dataset>`, run in this process, on miniature raw data and on the procedural kind."""

import runpy
import sys
from pathlib import Path

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.raw.arkitscenes import ArkitScenes
from h2a2_jax.scans.raw.s3dis import S3dis
from h2a2_jax.scans.raw.scannet import ScanNet
from h2a2_jax.scans.raw.sunrgbd import SunRgbd
from h2a2_jax.scans.specs import RSCAN, SPECS
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.scans.tfds_source import TfdsSource
from tests.prepare.tiny import assert_equal
from tests.scans.raw.miniature import write_arkitscenes, write_s3dis, write_scannet, write_sunrgbd


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs a command and returns its exit status, standard output and standard error."""

    def run(dataset: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [dataset, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"data.{dataset}", run_name="__main__")
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("dataset", "write", "parser", "options"),
    [
        ("scannet", write_scannet, ScanNet, ()),
        ("sun_rgbd", write_sunrgbd, SunRgbd, ()),
        ("s3dis", write_s3dis, S3dis, ("--val-area=5",)),
        ("arkitscenes", write_arkitscenes, ArkitScenes, ()),
    ],
)
def test_raw_data_are_prepared_and_read_back_equal(tmp_path, run, dataset, write, parser, options):
    write(tmp_path / "raw")
    raw = parser(tmp_path / "raw")
    output = tmp_path / "prepared"
    status, printed, _ = run(dataset, f"--raw={tmp_path / 'raw'}", f"--output={output}", "--workers=1", *options)
    assert status == 0, printed
    assert "published" in printed and "Warning: train has" in printed
    for split, names in raw.splits.items():
        source = TfdsSource(output, split, raw.spec)
        assert tuple(source.names) == tuple(sorted(names))
        for index, name in enumerate(source.names):
            assert_equal(source[index], raw.load(name))


@pytest.mark.parametrize("spec", [*SPECS, RSCAN], ids=lambda spec: spec.name)
def test_procedural_data_are_prepared_and_read_back_equal(tmp_path, run, spec):
    arguments = ("--train=2", "--val=1", "--seed=4", "--scale=demo", "--workers=1", f"--output={tmp_path}")
    command = (f"synthetic_{spec.name}",) if spec in SPECS else ("synthetic", spec.name)
    status, printed, errors = run(*command, *arguments)
    assert status == 0, errors
    assert "published" not in printed
    for split, size in (("train", 2), ("val", 1)):
        source = TfdsSource(tmp_path, split, spec)
        expected = SyntheticSource(spec, split, size, seed=4, scale="demo")
        assert list(source.names) == expected.names
        for index in range(size):
            assert_equal(source[index], expected[index])


def test_a_scan_that_fails_gives_status_one_and_can_be_left_out(tmp_path, run):
    write_scannet(tmp_path / "raw")
    broken = tmp_path / "raw" / "scans" / "scene0000_00" / "scene0000_00_vh_clean_2.ply"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = (f"--raw={tmp_path / 'raw'}", f"--output={tmp_path / 'out'}", "--workers=1")
    status, printed, errors = run("scannet", *arguments)
    assert status == 1
    assert "1 of 4 scans cannot be prepared:" in printed and "--skip-failed" in errors.splitlines()[-1]
    with pytest.raises(InputError, match="only half prepared"):
        TfdsSource(tmp_path / "out", "train", ScanNet(tmp_path / "raw").spec)
    status, _, errors = run("scannet", *arguments, "--skip-failed")
    assert status == 0, errors
    assert list(TfdsSource(tmp_path / "out", "train", ScanNet(tmp_path / "raw").spec).names) == ["scene0001_00"]


@pytest.mark.parametrize(
    ("dataset", "arguments", "sentence"),
    [
        ("scannet", (), "the following arguments are required: --raw"),
        ("scannet", ("--raw=/nowhere",), "There is no folder /nowhere"),
        ("sun_rgbd", ("--raw=/nowhere", "--annotations=v3"), "argument --annotations: invalid choice: 'v3'"),
        ("s3dis", ("--raw=/nowhere", "--val-area=x"), "argument --val-area: invalid int value: 'x'"),
        ("synthetic_scannet", ("--train=0",), "A synthetic source of 0 scans was asked for"),
        ("synthetic_s3dis", ("--workers=0",), "--workers is 0; expected at least 1."),
        ("synthetic", (), "the following arguments are required: dataset"),
        ("synthetic", ("s3dis",), "argument dataset: invalid choice: 's3dis'"),
        ("synthetic_s3dis", ("--sale=demo",), "unrecognized arguments: --sale=demo"),
        ("synthetic_s3dis", (f"--output={Path(__file__)}",), "cannot be written (File exists)"),
    ],
)
def test_wrong_arguments_are_one_sentence(run, dataset, arguments, sentence):
    status, printed, errors = run(dataset, *arguments)
    assert status == 2 and printed == ""
    assert len(errors.strip().splitlines()) == 1 and sentence in errors
