"""Whole files: complete, or as they were before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.files import check_name, remove_parts, whole_file


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    with whole_file(tmp_path / "a.txt") as mine:
        monkeypatch.setattr("os.getpid", lambda: 0)
        with whole_file(tmp_path / "a.txt") as other:
            mine.write_text("mine")
            other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_left_of_files_is_removed(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, own, other = (
        tmp_path / name for name in (f".curves.{ended.pid}.part.png", f".a.{os.getpid()}.part", ".b.part")
    )
    for path in (left, own, other):
        path.write_text("half")
    remove_parts(tmp_path)
    assert not left.exists() and own.exists() and other.exists()


def test_folders_that_no_system_opens(tmp_path):
    check_name(tmp_path / "missing" / "run")
    for name, why in (("a" * 300, "too long"), ("a\0b", "null"), ("b\udcff", "not UTF-8")):
        with pytest.raises(InputError, match=f"The folder .*{why}.*give another one"):
            check_name(tmp_path / name)
