"""Files of one JSON object a line, which a run appends to and goes on with after a kill."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file


class JsonLinesWriter:
    """Appends objects to a file, one a line; "step" and "version" are the first keys of each.

    Every line is flushed when written, so that a killed run leaves its lines behind. A last line that a kill cut short
    is dropped when the run goes on.

    Args:
        path: of the file; its folder is made if missing.
        version: of the schema.
    """

    def __init__(self, path: Path, version: int):
        self.path, self._version = path, version
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            step: optimiser steps done.
            values: further keys; JSON values, finite.

        Raises:
            ValueError: a key is one of the schema, or a number is not finite.
        """
        reserved = {"step", "version"} & values.keys()
        if reserved:
            raise ValueError(f"metrics of step {step} contain {sorted(reserved)}, which the writer sets; rename them")
        line = {"step": int(step), "version": self._version, **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._file.close()


def read_json_lines(path: Path, version: int) -> list[dict[str, Any]]:
    """The lines of a file in the order of their steps; of two lines of one step the later one counts.

    A last line that a kill cut short is passed over.

    Raises:
        InputError: a line is no JSON object with a step, or of another version.
    """
    text = path.read_text(encoding="utf-8")
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            values = json.loads(line)
            step, given = values["step"], values["version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"Line {number} of {path} is no JSON object with a step and a version ({error})."
            ) from error
        if given != version:
            raise InputError(
                f"Line {number} of {path} has version {given}, this program reads version {version}: use the program "
                "that wrote it."
            )
        by_step[step] = values
    return [by_step[step] for step in sorted(by_step)]


def drop_lines_after(path: Path, step: int) -> None:
    """Cut the lines of later steps off a file that may not be there, and what a kill cut short.

    Args:
        path: of the file.
        step: the last one to stay.

    Raises:
        InputError: a line is no JSON object with a step.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line, path) <= step]
    if len(kept) < len(lines):
        with whole_file(path) as part:
            part.write_bytes(b"".join(kept))


def _step_of(line: bytes, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"A line of {path} is no JSON object with a step ({error}): repair or remove it.") from error


def _drop_cut_line(path: Path) -> None:
    """Cut the file behind its last line feed."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
