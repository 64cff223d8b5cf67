"""The command line: what each command takes, and the sentence that wrong input ends in."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from h2a2_jax import __version__
from h2a2_jax.cli import COMMANDS, main, parse, run_py

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections loads configs so


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "needs --config and --workdir"),
        (["--config=configs/joint.py:demoo"], "no variant 'demoo'; its variants are paper, synthetic, demo"),
        (
            ["--config=configs/nowhere.py"],
            "There is no config file configs/nowhere.py; an example is --config=configs/",
        ),
        (["--config=configs/joint.py:demo", "--config.optim.lrr=3"], "unknown config key lrr Did you mean 'lr'"),
        (
            ["--config=configs/joint.py:demo", "--config.optim.learning_rate=3"],
            "unknown config key 'learning_rate' (keys there: accumulate_steps, clip_norm, ",
        ),
        (["--config=configs/joint.py"], "The data of scannet is not there: data/scannet"),
        (["--config=configs/joint.py:synthetic"], "or one that `python -m data.synthetic_scannet` prepared"),
        (["--config=configs/joint.py:demo", "--mode=eval"], "There is no folder"),
        (["--config=configs/joint.py:demo", "--coordinator=localhost:1"], "all three or none; or --coordinator=auto"),
        (
            ["--config=configs/joint.py:demo", "--coordinator=x:99999", "--num_processes=2", "--process_id=1"],
            "--coordinator is 'x:99999'; expected host:port of process 0 with a port from 1 to 65535",
        ),
        (
            ["--config=configs/joint.py:demo", "--process_timeout=0"],
            "--process_timeout is '0'; expected a number from 1",
        ),
        (
            ["--config=configs/joint.py:demo", "--seeds=1"],
            "--seeds is for --mode=tau_sweep and --mode=ablation and --mode=transfer, given",
        ),
        (
            ["--config=configs/joint.py:demo", "--mode=tau_sweep", "--taus=a,1"],
            "--taus is 'a,1'; expected numbers as in",
        ),
        (["--config=configs/joint.py:demo", "--data=scans"], "--data is for --mode=eval and --mode=check, given"),
        (["--mode=predict"], "train first, or give the folder of a run"),
        (["--mode=predict", "--formats=csv"], "--formats=csv is for files of points"),
        (["--mode=predict", "--up=y"], "--up is for files of points: name them with --input"),
        (["--mode=predict", "--input=nothing.ply"], "nothing.ply"),
        (["--mode=predict", "--input=a.ply", "--process_id=1"], "--process_id is for the scans of a config"),
        (["--mode=predict", "--input="], "--input is empty; expected are files, folders or patterns"),
        (["--mode=predict", "--input=README.md", "--formats=obj"], "--formats is 'obj'; expected is one of json, csv"),
        (["--mode=eval", "--tta=flips"], "flips"),
        (["--mode=eval", "--input=a.ply"], "--input is for --mode=predict, given with --mode=eval"),
        (["--mode=check", "--data=data"], "--workdir is not for --mode=check"),
        (["--mode=check", "--data=data", "--config=configs/joint.py:demo"], "--config is not for --mode=check"),
        (["--mode=training"], "--mode is 'training'; expected one of train, eval, predict"),
        (["--mode=predict", "--scores=0.1"], "--mode=predict has no flag --scores; did you mean --score?"),
        (["--mode=predict", "--score=2"], "--score is '2'; expected a number from 0 to 1"),
        (["--mode=predict", "--up=w"], "--up is 'w'; expected one of 'z', '-z'"),
        (["room.ply"], "--mode=train takes flags only, given 'room.ply'"),
        (["--mode=report"], "There is no folder"),
        (["--mode=ablation"], "as in --mode=ablation --config=configs/joint.py:demo --workdir=runs/demo; --help lists"),
        (["--config=configs/joint.py:demo", "--mode=transfer"], "--mode=transfer needs --held_out, the dataset"),
        (["--config=configs/joint.py:demo,no_sfks", "--mode=ablation"], "give a config that has model.selection"),
        (["--config=configs/joint.py:demo", "--mode=eval", "--accept_changes"], "--accept_changes is for --mode=train"),
        (
            ["--config=configs/joint.py:demo", "--config.optim.accumulate_steps=0"],
            "optim.accumulate_steps is 0; expected 1 or more",
        ),
        (["--config=configs/joint.py:demo", "--config.optim.ema_decay=1.0"], "expected a number from 0 to below 1"),
        (
            ["--config=configs/joint.py:tiny", "--config.optim.freeze=('stm',)"],
            "optim.freeze has 'stm', which names no",
        ),
        (["--mode=eval", "--step=first"], "--step is 'first'; expected a number, best or last"),
        (["--mode=replay"], "has no kept batch: nothing was not finite in that run"),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_status_2(
    tmp_path: Path,
    flags: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    workdir = [] if not flags else [f"--workdir={tmp_path / 'run'}"]
    assert run_py([*flags, *workdir]) == 2
    printed = capfd.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "there is no command 'trian'; commands are train, eval, predict"),
        (["sweep", "ablations"], "Did you mean 'sweep ablation'?"),
        (["train", "--workdir=runs/a"], "needs --config and --workdir, as in h2a2 train --config="),
        (["eval"], "h2a2 eval needs --workdir, the folder of a run"),
        (["eval", "--workdir=runs/a", "--config.optim.lr=1"], "--config.optim.lr needs --config, the file"),
        (["train", "--config"], "--config has no value"),
        (["predict", "--cross"], "--cross is for h2a2 eval, given with h2a2 predict"),
        (["predict", "--wrokdir=a"], "h2a2 predict has no flag --wrokdir; did you mean --workdir?"),
        (["predict"], "h2a2 predict needs files of points, as in room.ply, or --sample; with --workdir alone it takes"),
        (["predict", "a.ply", "--workdir=a", "--weights=b"], "--workdir and --weights are given, two detectors"),
        (["predict", "a.ply", "--step=last"], "--step goes with a checkpoint: name the folder of its run"),
        (
            ["predict", "a.ply", "--names=sofa"],
            "--names is 'sofa'; expected names as in garbagebin=trash can,sofa=couch",
        ),
        (["predict", "a.ply", "--tile=large"], "--tile is 'large'; expected is auto, off or the sides of tiles"),
        (["predict", "--workdir=a", "--agnostic_nms"], "--agnostic_nms is for files of points"),
        (["predict", "--workdir=a", "--score=0"], "--score is for files of points"),  # 0 is a score
        (["predict", "--sample", "--weights=romms"], "There are no weights 'romms' (did you mean 'rooms'?)"),
        (["check"], "h2a2 check needs --data=FOLDER"),
        (["sweep", "protocol", "--trainings=0"], "--trainings is '0'; expected a number of 1 or more"),
        (["sweep", "ablation", "--jobs=many"], "--jobs is 'many'; expected a whole number"),
        (
            ["sweep", "transfer", "--config=configs/joint.py:demo", "--workdir=a"],
            "sweep transfer needs --held_out",
        ),
    ],
)
def test_the_script_names_its_commands_in_its_sentences(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("h2a2: ") and sentence in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"]])
def test_the_overview_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    within = [command for command in COMMANDS if arguments == ["--help"] or command.name.startswith("sweep")]
    assert all(f"h2a2 {command.name} " in printed and command.summary in printed for command in within)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_lists_the_flags_of_the_command_alone(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.name.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert ("--workdir" in printed) == (command.name not in ("check", "convert", "table", "weights"))
    assert ("--align" in printed) == (command.name == "predict")
    assert ("--taus" in printed) == (command.name == "sweep tau")
    assert ("--seeds" in printed) == (command.name in ("sweep tau", "sweep ablation", "sweep transfer"))


def test_run_py_lists_its_modes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_py(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--mode={command.mode} " in printed for command in COMMANDS if command.mode)


def test_keys_of_version_0_1_0_may_be_given_as_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    flags = ["--config=configs/joint.py:demo", "--config.optim.batches=0", f"--workdir={tmp_path / 'run'}"]
    assert run_py(flags) == 2
    assert "optim.accumulate_steps is 0; expected 1 or more" in capsys.readouterr().err


def test_datasets_whose_names_are_no_identifiers_have_flags_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    flags = ["--config=configs/joint.py:six,tiny", f"--workdir={tmp_path / 'run'}", "--config.datasets.3rscan.seed=3"]
    assert run_py([*flags, "--config.datasets.3rscan.share=1.5"]) == 2
    assert "datasets.3rscan.share is 1.5; expected a number above 0 up to 1, or None." in capsys.readouterr().err


def test_switches_may_have_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, refused in (("--show", True), ("--show=true", True), ("--show=false", False), ("--noshow", False)):
        assert run_py(["--mode=predict", flag, f"--workdir={tmp_path / 'run'}"]) == 2
        assert ("--show is for files of points" in capsys.readouterr().err) == refused


def test_the_module_is_the_script() -> None:
    done = subprocess.run([sys.executable, "-m", "h2a2_jax", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_an_output_that_nobody_reads_ends_quietly() -> None:
    command = f"{sys.executable} -m h2a2_jax weights | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("name") and not done.stderr


def test_the_script_h2a2_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="h2a2")
    assert script.load() is main


def documented_commands() -> list[str]:
    """Lines of shell blocks of the README and of docs that run a command."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line.strip() for page in pages for line in page.read_text().replace("\\\n", " ").splitlines()]
    return sorted({line for line in lines if re.match(r"(python run\.py|h2a2) -?-?\w", line)})


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        mode = next((argument[7:] for argument in arguments if argument.startswith("--mode=")), "train")
        command = next(command for command in COMMANDS if command.mode == mode)
        arguments = [argument for argument in arguments[1:] if not argument.startswith("--mode=")]
    else:
        command = next(c for c in COMMANDS if c.name.split() == arguments[: len(c.name.split())])
        arguments = arguments[len(command.name.split()) :]
    given = parse(command, arguments)
    assert given.config is None or given.experiment().datasets
