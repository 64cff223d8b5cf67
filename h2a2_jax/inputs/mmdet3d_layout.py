"""Lays out single scans and their annotations as a prepared mmdetection3d folder.

    python -m h2a2_jax.inputs.mmdet3d_layout --scan scene0000_00.bin --infos scannet_infos.pkl \
        --dataset scannet --output data/scannet

The train and the validation info files name the same scans: good for trying things out, not for measuring.
"""

import argparse
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.mmdet3d import default_info_files, scan_name
from h2a2_jax.inputs.specs import SPECS, DatasetSpec, dataset_spec
from h2a2_jax.inputs.unpickle import load_plain_pickle


def lay_out(scans: Sequence[Path], infos: Path, spec: DatasetSpec, output: Path) -> list[Path]:
    """Copies scans and writes the info files that name them.

    Args:
        scans: `.bin` files.
        infos: a version 2 info file that annotates each of them.
        spec: the dataset they belong to.
        output: the folder to make; files of the same names in it are replaced.

    Returns:
        The info files written, one for training and one for validation.

    Raises:
        InputError: a file is missing, or `infos` is no version 2 info file or lacks a scan.
    """
    for scan in scans:
        if not scan.is_file():
            raise InputError(f"There is no file {scan}: give the .bin file of a scan.")
    content = load_plain_pickle(infos)
    if not isinstance(content, dict) or "data_list" not in content:
        raise InputError(f"{infos} is no version 2 info file: it should hold a dictionary with data_list.")
    try:
        entries = {scan_name(entry["lidar_points"]["lidar_path"]): entry for entry in content["data_list"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{infos} is no version 2 info file: an entry of data_list lacks lidar_points with lidar_path."
        ) from error
    missing = [scan.stem for scan in scans if scan.stem not in entries]
    if missing:
        raise InputError(f"{infos} does not annotate {', '.join(missing)}: give the info file that does.")
    (output / "points").mkdir(parents=True, exist_ok=True)
    for scan in scans:
        shutil.copyfile(scan, output / "points" / scan.name)
    chosen = {**content, "data_list": [entries[scan.stem] for scan in scans]}
    train, *other_areas = default_info_files(spec, "train")
    (val,) = default_info_files(spec, "val")
    for file in (train, val):
        (output / file).write_bytes(pickle.dumps(chosen))
    for file in other_areas:
        (output / file).write_bytes(pickle.dumps({**content, "data_list": []}))
    return [output / train, output / val]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Lay out scans as a prepared mmdetection3d folder.")
    parser.add_argument("--scan", type=Path, nargs="+", required=True, help=".bin files: x, y, z, r, g, b in float32")
    parser.add_argument("--infos", type=Path, required=True, help="version 2 info file that annotates them")
    parser.add_argument("--dataset", choices=[spec.name for spec in SPECS], required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    try:
        written = lay_out(options.scan, options.infos, dataset_spec(options.dataset), options.output)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Wrote {len(options.scan)} scans and {', '.join(path.name for path in written)} to {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
