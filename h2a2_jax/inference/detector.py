"""A trained detector for arrays of points: restore it, call it, get boxes.

    detector = Detector.restore("runs/joint")
    boxes = detector(points, colors, dataset="scannet")

`h2a2_jax.read_point_cloud` reads files; `run.py --mode=predict` reads folders of files.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np

from h2a2_jax.boxes.nms import Detections
from h2a2_jax.checkpoint.store import read_detector
from h2a2_jax.compilation import default_cache, private_folder
from h2a2_jax.errors import InputError
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import align
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.loader.batching import no_scan
from h2a2_jax.scans.file_frame import decide_frame
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, ColorRange, PointCloud, cloud_of_arrays
from h2a2_jax.scans.frame import (
    UNITS,
    UPRIGHT,
    Floor,
    PlacedCloud,
    checked_floor,
    place_as_dataset,
    place_cloud,
    respelt,
    upright_matrix,
)
from h2a2_jax.scans.specs import DatasetSpec


class Detector:
    """Boxes of point clouds from a trained model.

    The first call of a number of scans, and of a much larger scan than before, compiles; later calls do not, nor do
    later processes (`cache`). May be called from several threads.

    Attributes:
        predictor: the predictor of `Scan`s that does the work.
    """

    def __init__(self, predictor: Predictor):
        """Wrap a predictor; `restore` makes a detector from a checkpoint."""
        self.predictor = predictor

    @classmethod
    def restore(
        cls,
        checkpoint: str | Path,
        *,
        step: int | None = None,
        score_threshold: float = 0.01,
        iou_threshold: float = 0.5,
        conditioning: str = "own",
        kernels: Literal["selected", "shared"] = "selected",
        cache: str | Path | bool = True,
    ) -> "Detector":
        """Restore the detector of a checkpoint.

        Args:
            checkpoint: folder of a run, its "checkpoints", or the folder of a step in that.
            step: step of the checkpoint; None: that of the path, or the last.
            score_threshold: lowest score that a call can ask for.
            iou_threshold: bird's-eye-view IoU above which the lower score of a class is suppressed.
            conditioning: dataset whose embedding, statistics and exclusive kernels are used: "own" is that of the call,
                the name of another one, or "mean" of all, for data that no dataset stands for.
            kernels: "selected" by each scan's structure, or "shared" everywhere.
            cache: folder that keeps compiled programs for later processes; True: that of the user
                (`h2a2_jax.compilation.default_folder`), or none, with a warning, if it cannot be trusted; False: none.
                JAX's own settings stay as they are.

        Raises:
            InputError: there is no such checkpoint, or it cannot be read, or has no such dataset to condition on; or
                an argument is not as above; or others can write to the folder of the cache.
        """
        _check_choice("kernels", kernels, ("selected", "shared"))
        _check_share("score_threshold", score_threshold)
        _check_share("iou_threshold", iou_threshold)
        folder = None if isinstance(cache, bool) else private_folder(Path(cache))
        if cache is True:
            folder = default_cache(lambda sentence: warnings.warn(sentence, stacklevel=2))
        stored = read_detector(checkpoint, step)
        predictor = Predictor(
            stored,
            stored.specs,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            conditioning=conditioning,
            kernels=kernels,
            cache=folder,
        )
        return cls(predictor)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets that the model was trained on."""
        return tuple(spec.name for spec in self.predictor.specs)

    def classes(self, dataset: str) -> tuple[str, ...]:
        """Names of a dataset's classes, by label.

        Raises:
            InputError: the model was not trained on it.
        """
        return self.predictor.spec(dataset).classes

    @overload
    def __call__(
        self,
        points: np.ndarray,
        colors: np.ndarray | None = None,
        dataset: str | None = None,
        *,
        score: float = ...,
        up: str = ...,
        unit: str = ...,
        color_range: ColorRange = ...,
        floor: Floor = ...,
        batch_size: int = ...,
    ) -> Boxes: ...

    @overload
    def __call__(
        self,
        points: Sequence[np.ndarray],
        colors: Sequence[np.ndarray | None] | None = None,
        dataset: str | None = None,
        *,
        score: float = ...,
        up: str = ...,
        unit: str = ...,
        color_range: ColorRange = ...,
        floor: Floor = ...,
        batch_size: int = ...,
    ) -> list[Boxes]: ...

    def __call__(
        self,
        points: np.ndarray | Sequence[np.ndarray],
        colors: np.ndarray | Sequence[np.ndarray | None] | None = None,
        dataset: str | None = None,
        *,
        score: float = 0.1,
        up: str = "auto",
        unit: str = "auto",
        color_range: ColorRange = "auto",
        floor: Floor = "auto",
        batch_size: int = 1,
    ) -> Boxes | list[Boxes]:
        """Boxes of one point cloud, or of several.

        Args:
            points: [n, 3] numbers x, y, z; or a list of such arrays. float64 keeps map coordinates exact.
            colors: [n, 3] red, green, blue, 0-255 or 0-1; or a list of such arrays. Without them points are taken as
                grey, which the model has not seen in training.
            dataset: dataset whose head predicts: it sets classes, statistics and exclusive kernels, and whether boxes
                have yaw. May be left out where the model knows one only.
            score: lowest score of a box.
            up: axis that points up, with its sign: z, -z, y, -y, x or -x; "auto": as the points show, else z.
            unit: unit of the points, m, cm, mm, ft or in; "auto": as the points show, else m. Boxes are given in it.
            color_range: "0-1", "0-255", "none" (do not use them), or "auto": by their type and largest value.
            floor: height of the floor (m, along the axis that points up); "auto": as found, "keep": heights are left
                alone.
            batch_size: point clouds in one pass of the network; more than one pays on accelerators.

        Returns:
            The boxes of each point cloud; a list for a list. `Boxes.remarks` says what was decided: the up axis, the
            unit, the scale of colours, and the floor, which the network is shown at the dataset's height; and where
            the scan looks tilted, or its walls turned for boxes that are axis-aligned. Points are drawn as the
            dataset's test protocol says; each call draws the same ones.

        Raises:
            InputError: an argument is not as above; a point cloud has no finite point; its colours are in another
                range.
        """
        single = not isinstance(points, list | tuple)
        clouds = cast(Sequence[Any], [points] if single else points)
        for cloud in clouds:
            if isinstance(cloud, str | Path | PointCloud):
                raise InputError(
                    f"The points are a {type(cloud).__name__}; expected is an array of shape [n, 3]: of a file, "
                    "cloud = h2a2_jax.read_point_cloud(FILE) has cloud.points and cloud.colors."
                )
        clouds = [_plain_array("points", cloud) for cloud in clouds]
        if {cloud.ndim for cloud in clouds} & ({3} if single else {1}):
            shapes = "one array of three dimensions" if single else "a list of rows"
            raise InputError(
                f"The points are {shapes}; expected is an array [n, 3] for a point cloud, as np.array(rows), and a "
                "list of such arrays for several."
            )
        hues = cast(Sequence[Any], [colors] if single else [None] * len(clouds) if colors is None else colors)
        if not isinstance(hues, list | tuple) or len(hues) != len(clouds):
            given = f"a list of {len(hues)}" if isinstance(hues, list | tuple) else f"one {type(hues).__name__}"
            raise InputError(
                f"The points are a list of {len(clouds)}, the colours {given}; expected is a list with an array, or "
                "None, for each of the point clouds."
            )
        if dataset is None and len(self.datasets) > 1:
            raise InputError(f"dataset is not given: say whose head predicts, one of {', '.join(self.datasets)}.")
        spec = self.predictor.spec(self.datasets[0] if dataset is None else dataset)
        _check_choice("up", up, (*UPRIGHT, "auto"))
        _check_choice("unit", unit, (*UNITS, "auto"))
        height = checked_floor(floor, "floor")
        _check_choice("color_range", color_range, COLOR_RANGES)
        _check_share("score", score)
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected is an integer from 1 on.")
        placed, remarks = [], []
        for i, (cloud, hue) in enumerate(zip(clouds, hues, strict=True)):
            read = cloud_of_arrays(cloud, None if hue is None else _plain_array("colors", hue), color_range)
            assumed = (respelt(remark, "color_range", "={!r}") for remark in read.assumed)
            axis, length, decided = decide_frame(read, up, unit, "{}={!r}")
            scan = place_cloud(
                str(i + 1), read, upright_matrix(axis, length), color_range, colors_hint="say color_range"
            )
            _, turning = align(scan, "none", spec, "turn it first, as h2a2 predict --align={}")
            scan, placing = place_as_dataset(scan, spec, height, "floor={!r}")
            placed.append(scan)
            remarks.append((*assumed, *decided, *turning, *placing))
        found: list[Boxes] = []
        for start in range(0, len(placed), batch_size):
            batch, said = placed[start : start + batch_size], remarks[start : start + batch_size]
            # A last batch that is smaller would be another shape to compile.
            filler = [no_scan()] * (batch_size - len(batch))
            # The name seeds the drawing of points: one name, so that a cloud gives the same boxes anywhere in a list.
            drawn = [prepare(replace(cloud.scan, name="scan"), spec) for cloud in batch]
            detections = self.predictor.predict([*drawn, *filler], spec.name)
            found += [_boxes(*each, spec, score) for each in zip(detections, batch, said, strict=False)]
        return found[0] if single else found


def _boxes(found: Detections, placed: PlacedCloud, remarks: tuple[str, ...], spec: DatasetSpec, score: float) -> Boxes:
    """Boxes of at least a score in the frame and unit of the points as they were given."""
    return Boxes.of(found.of_score(score), placed.scan, placed.matrix, spec, remarks=remarks)


def _plain_array(what: str, values: Any) -> np.ndarray:
    """Convert what arrays of other libraries, or lists, hold; raise InputError for what numpy cannot read."""
    if np.ma.is_masked(values):
        raise InputError(f"The {what} are partly masked; give the rows that count alone, as a plain array.")
    try:
        array = np.asarray(values)
        if array.ndim == 0 and array.dtype == object:
            raise TypeError("it has no rows")
        return array
    except Exception as error:  # libraries raise anything, as of arrays on a device
        raise InputError(f"The {what} are a {type(values).__name__} that is no array for numpy: {error}") from error


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; expected is one of {', '.join(known)}.")


def _check_share(name: str, value: Any) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"{name} is {value!r}; expected is a number from 0 to 1.")
