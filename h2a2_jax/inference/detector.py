"""A trained detector: restore it or name its weights, give it point clouds, get boxes.

    detector = Detector.from_pretrained("tr3d-scannet")
    boxes = detector("room.ply")
    boxes.save("room.html")

`h2a2 predict` does it for folders of files.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol, TypedDict, Unpack, overload, runtime_checkable

import numpy as np

from h2a2_jax.boxes.nms import Detections
from h2a2_jax.checkpoint.store import StoredDetector, read_detector
from h2a2_jax.compilation import default_cache, private_folder
from h2a2_jax.errors import InputError
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.placement import AUTO, Align, Frame, PlacedScan, place_scan
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.inference.scan_prediction import (
    BoxChoice,
    drawn_points,
    plan_scan,
    predict_scan,
    present_names,
    renamed_specs,
)
from h2a2_jax.inference.tiles import Tiling, checked_tiling, tiles_for
from h2a2_jax.loader.batching import no_scan
from h2a2_jax.pretrained.folder import write_pretrained
from h2a2_jax.pretrained.load import load_pretrained
from h2a2_jax.scans.formats.point_cloud import ColorRange, PointCloud, cloud_of_arrays, read_point_cloud
from h2a2_jax.scans.frame import Floor, respelt


@runtime_checkable
class HasPoints(Protocol):
    """A point cloud with attributes: `read_point_cloud` of a file, or one of Open3D."""

    @property
    def points(self) -> Any:
        """x, y, z of each point, [n, 3] numbers."""

    @property
    def colors(self) -> Any:
        """Red, green, blue of each point, [n, 3] numbers; None or empty without colours."""


Points = np.ndarray | str | Path | HasPoints
"""A point cloud: [n, 3] numbers x, y, z, the path of a file, or an object that has points and colours."""


class _CallOptions(TypedDict, total=False):
    """Keyword arguments of a call of a detector, which says what they mean."""

    score: float
    classes: Sequence[str]
    agnostic_nms: bool
    up: str
    unit: str
    color_range: ColorRange
    floor: Floor
    align: Align
    tile: Tiling
    batch_size: int
    progress: bool


class Detector:
    """Boxes of point clouds from a trained model.

    The first call of a number of scans, and of a much larger scan than before, compiles; later calls do not, nor do
    later processes (`cache`). May be called from several threads.

    Attributes:
        predictor: the predictor of `Scan`s that does the work.
        stored: the weights, as `save_pretrained` writes them; None for a detector of a predictor alone.
        names: names of one's own for classes, by those of the datasets.
    """

    def __init__(
        self, predictor: Predictor, stored: StoredDetector | None = None, names: Mapping[str, str] | None = None
    ):
        """Wrap a predictor; `from_pretrained` and `restore` make detectors of weights.

        Raises:
            InputError: it is a name or a path.
        """
        if isinstance(predictor, str | PurePath):
            raise InputError(f"Detector({str(predictor)!r}) is no detector: use Detector.from_pretrained.")
        self.predictor, self.stored, self.names = predictor, stored, dict(names or {})

    @classmethod
    def from_pretrained(
        cls,
        weights: str | Path = "rooms",
        *,
        score_threshold: float = 0.01,
        iou_threshold: float = 0.5,
        conditioning: str = "own",
        kernels: Literal["selected", "shared"] = "selected",
        names: Mapping[str, str] | None = None,
        cache: str | Path | bool = True,
    ) -> "Detector":
        """Make a detector of weights by name; they are downloaded once.

        Args:
            weights: "tr3d-scannet", "tr3d-sunrgbd", "tr3d-s3dis", or the same with "fcaf3d" (published, mmdetection3d),
                "rooms" (shipped, of procedural rooms), a folder that `save_pretrained` wrote, the folder of a run, a
                .pth file of TR3D or FCAF3D, or "organisation/name" of the Hugging Face hub. `h2a2 weights` lists what
                there is.
            score_threshold: lowest score that a call can ask for.
            iou_threshold: as of `restore`.
            conditioning: as of `restore`.
            kernels: as of `restore`.
            names: as of `restore`.
            cache: as of `restore`.

        Raises:
            InputError: there are no such weights, or they cannot be downloaded or read; the sentence says where to put
                a file by hand. Or as of `restore`.
        """
        return cls._of(
            lambda: load_pretrained(weights, _say), score_threshold, iou_threshold, conditioning, kernels, names, cache
        )

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
        names: Mapping[str, str] | None = None,
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
            names: names of classes in the results, by those of the datasets, as in {"garbagebin": "trash can"}.
            cache: folder that keeps compiled programs for later processes; True: that of the user
                (`h2a2_jax.compilation.default_folder`), or none, with a warning, if it cannot be trusted; False: none.
                JAX's own settings stay as they are.

        Raises:
            InputError: there is no such checkpoint, or it cannot be read, or has no such dataset to condition on; or
                an argument is not as above; or others can write to the folder of the cache.
        """
        return cls._of(
            lambda: read_detector(checkpoint, step), score_threshold, iou_threshold, conditioning, kernels, names, cache
        )

    @classmethod
    def _of(
        cls,
        load: Callable[[], StoredDetector],
        score_threshold: float,
        iou_threshold: float,
        conditioning: str,
        kernels: Literal["selected", "shared"],
        names: Mapping[str, str] | None,
        cache: str | Path | bool,
    ) -> "Detector":
        _check_choice("kernels", kernels, ("selected", "shared"))
        _check_share("score_threshold", score_threshold)
        _check_share("iou_threshold", iou_threshold)
        folder = None if isinstance(cache, bool) else private_folder(Path(cache))
        if cache is True:
            folder = default_cache(lambda sentence: warnings.warn(sentence, stacklevel=3))
        stored = load()
        predictor = Predictor(
            stored,
            renamed_specs(stored.specs, names or {}),
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            conditioning=conditioning,
            kernels=kernels,
            cache=folder,
        )
        return cls(predictor, stored, names)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the weights as a folder that `from_pretrained` reads on any machine, and return its path.

        It holds `model.safetensors`, `config.json` and a model card, `README.md`, and can be uploaded to the Hugging
        Face hub as it is.

        Raises:
            InputError: the folder holds other things, or cannot be written; or the detector has no weights of its own.
        """
        if self.stored is None:
            raise InputError(
                "This detector was made of a predictor alone: restore one, or name its weights, to save it."
            )
        write_pretrained(self.stored, Path(folder))
        return Path(folder)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets that the model was trained on."""
        return tuple(spec.name for spec in self.predictor.specs)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads: those of the datasets, and "union" where they have one label space."""
        return tuple(spec.name for spec in self.predictor.heads)

    def classes(self, dataset: str) -> tuple[str, ...]:
        """Names of the classes of a head, by label.

        Raises:
            InputError: the model has no such head.
        """
        return self.predictor.spec(dataset).classes

    @overload
    def __call__(
        self, points: Points, colors: np.ndarray | None = ..., dataset: str = ..., **options: Unpack[_CallOptions]
    ) -> Boxes: ...

    @overload
    def __call__(
        self,
        points: list[Points] | tuple[Points, ...],
        colors: Sequence[np.ndarray | None] | None = ...,
        dataset: str = ...,
        **options: Unpack[_CallOptions],
    ) -> list[Boxes]: ...

    def __call__(
        self,
        points: Points | list[Points] | tuple[Points, ...],
        colors: np.ndarray | Sequence[np.ndarray | None] | None = None,
        dataset: str = AUTO,
        *,
        score: float = 0.3,
        classes: Sequence[str] = (),
        agnostic_nms: bool = False,
        up: str = "auto",
        unit: str = "auto",
        color_range: ColorRange = "auto",
        floor: Floor = "auto",
        align: Align = "none",
        tile: Tiling = "auto",
        batch_size: int = 1,
        progress: bool = True,
    ) -> Boxes | list[Boxes]:
        """Boxes of one point cloud, or of several.

        Args:
            points: [n, 3] numbers x, y, z, where float64 keeps map coordinates exact; or the path of a file, a
                `PointCloud`, a point cloud of Open3D; or a list of such.
            colors: [n, 3] red, green, blue, 0-255 or 0-1; or a list of such arrays. Files have their own. Without them
                points are taken as grey, which the model has not seen in training.
            dataset: dataset whose head predicts: it sets classes, statistics and exclusive kernels, and whether boxes
                have yaw. "auto" takes that of single views (sunrgbd) for a view of a camera at the origin, that of
                rooms (scannet) for others. "union" predicts every class of a detector with one label space.
            score: lowest score of a box.
            classes: classes of the boxes; empty: all.
            agnostic_nms: True leaves one box, the best, where boxes of several classes overlap.
            up: axis that points up, with its sign: z, -z, y, -y, x or -x; "auto": as the points show, else z.
            unit: unit of the points, m, cm, mm, ft or in; "auto": as the points show, else m. Boxes are given in it.
            color_range: "0-1", "0-255", "none" (do not use them), or "auto": by their type and largest value.
            floor: height of the floor (m, along the axis that points up); "auto": as found, "keep": heights are left
                alone.
            align: "gravity" turns tilted points upright first, "manhattan" turns walls along x and y, which
                axis-aligned heads expect, "both", "none".
            tile: "auto" predicts more than 500,000 points in overlapping tiles at full resolution; a number is the
                length of their sides (m), for any scan; "off": one pass, of 500,000 points at most.
            batch_size: point clouds in one pass of the network; more than one pays on accelerators.
            progress: True shows a bar on a terminal for scans in several tiles.

        Returns:
            The boxes of each point cloud, best first; a list for a list. `Boxes.remarks` says what was decided: the
            head, the up axis, the unit, the scale of colours, and the floor, which the network is shown at the
            dataset's height; and where the scan looks tilted, or its walls turned for boxes that are axis-aligned.
            Points are drawn as the dataset's test protocol says; each call draws the same ones.

        Raises:
            InputError: an argument is not as above; a file cannot be read; a point cloud has no finite point; its
                colours are in another range.
        """
        single = not isinstance(points, list | tuple)
        named = _named_clouds(points, colors, single)
        given = {"up": up, "unit": unit, "colors": color_range, "floor": floor, "align": align, "dataset": dataset}
        frame = Frame.of(lambda name, value: f"{name}={value!r}", self.heads, "color_range", **given)
        choice = BoxChoice(present_names(_class_names(classes), self.names), agnostic_nms)
        choice.check(self.predictor.heads)
        tile = checked_tiling(tile, "tile")
        _check_share("score", score)
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected is an integer from 1 on.")
        read = [_read(cloud, hue, color_range) for _, cloud, hue in named]
        placed = [
            place_scan(name, cloud, frame, self.predictor.heads, colors_hint="say color_range")
            for (name, *_), cloud in zip(named, read, strict=True)
        ]
        found = self._predict(placed, tile, floor, int(batch_size), progress)
        result = []
        for (_, source, _), cloud, scan, boxes in zip(named, read, placed, found, strict=True):
            assumed = (respelt(remark, "color_range", "={!r}") for remark in cloud.assumed)
            result.append(
                Boxes.of(
                    choice.of(boxes, scan.spec).of_score(score),
                    scan.scan,
                    scan.matrix,
                    scan.spec,
                    file=source if isinstance(source, str | Path) else None,
                    remarks=(*assumed, *scan.remarks),
                    rows=scan.rows,
                )
            )
        return result[0] if single else result

    def _predict(
        self, placed: Sequence[PlacedScan], tile: Tiling, floor: Floor, batch_size: int, progress: bool
    ) -> list[Detections]:
        """Boxes of scans: those of one head in passes of `batch_size`, large ones tile by tile."""
        if batch_size == 1:
            return [
                predict_scan(
                    self.predictor, scan, plan_scan(self.predictor, scan, tile), tile, floor, progress=progress
                )
                for scan in placed
            ]
        found: dict[int, Detections] = {}
        in_passes: dict[str, list[int]] = {}
        for i, scan in enumerate(placed):
            if tiles_for(len(scan.scan.points), tile) is None:
                in_passes.setdefault(scan.spec.name, []).append(i)
            else:
                found[i] = predict_scan(self.predictor, scan, None, tile, floor, progress=progress)
        for dataset, rows in in_passes.items():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                drawn = [drawn_points(placed[i]) for i in batch]
                # A last batch that is smaller would be another shape to compile.
                filler = [no_scan()] * (batch_size - len(batch))
                found |= zip(batch, self.predictor.predict([*drawn, *filler], dataset), strict=False)
        return [found[i] for i in range(len(placed))]


def _say(sentence: str) -> None:
    """Print what is said once about weights, such as their licence, beside the output of the program."""
    print(sentence, file=sys.stderr)


def _named_clouds(points: Any, colors: Any, single: bool) -> list[tuple[str, Any, Any]]:
    """Point clouds as they were given, each with a name and its colours."""
    clouds: Sequence[Any] = [points] if single else points
    hues: Any = [colors] if single else [None] * len(clouds) if colors is None else colors
    if not isinstance(hues, list | tuple) or len(hues) != len(clouds):
        given = f"a list of {len(hues)}" if isinstance(hues, list | tuple) else f"one {type(hues).__name__}"
        raise InputError(
            f"The points are a list of {len(clouds)}, the colours {given}; expected is a list with an array, or "
            "None, for each of the point clouds."
        )
    if not single and clouds and all(_is_row(cloud) for cloud in clouds):
        raise InputError(
            "The points are a list of rows; expected is an array [n, 3] for a point cloud, as np.array(rows), and a "
            "list of such arrays for several."
        )
    names = (Path(cloud).stem if isinstance(cloud, str | Path) else str(i) for i, cloud in enumerate(clouds, 1))
    return list(zip(names, clouds, hues, strict=True))


def _class_names(classes: Any) -> tuple[str, ...]:
    names = (classes,) if isinstance(classes, str) else tuple(classes) if isinstance(classes, Iterable) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"classes is {classes!r}; expected is a list of names, as in ['chair', 'table'].")
    return names


def _is_row(cloud: Any) -> bool:
    return not isinstance(cloud, str | Path | HasPoints) and _plain_array("points", cloud).ndim == 1


def _read(cloud: Any, hue: Any, color_range: ColorRange) -> PointCloud:
    """Read a point cloud that was given in any of the forms of `Points`."""
    if isinstance(cloud, str | Path):
        if hue is not None:
            raise InputError(f"{cloud} is a file, which has its own colours: leave colors out.")
        if Path(cloud).is_dir():
            raise InputError(
                f"{cloud} is a folder: give a list of files, as sorted(pathlib.Path({str(cloud)!r}).glob('*.ply')) is, "
                "or use h2a2 predict."
            )
        return read_point_cloud(cloud, color_range=color_range)
    if isinstance(cloud, PointCloud) and hue is None:
        return cloud
    if isinstance(cloud, HasPoints):
        own = cloud.colors
        cloud, hue = cloud.points, own if hue is None and own is not None and len(own) else hue
    array = _plain_array("points", cloud)
    if array.ndim == 3:
        raise InputError(
            "The points are one array of three dimensions; expected is an array [n, 3] for a point cloud, as "
            "np.array(rows), and a list of such arrays for several."
        )
    return cloud_of_arrays(array, None if hue is None else _plain_array("colors", hue), color_range)


def _plain_array(what: str, values: Any) -> np.ndarray:
    """Convert what arrays of other libraries, or lists, hold; raise InputError for what numpy cannot read."""
    if isinstance(values, str | bytes | PurePath):
        raise InputError(f"The {what} are {values!r}; expected are numbers, or the path of a file as a str or a Path.")
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
