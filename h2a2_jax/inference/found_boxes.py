"""Boxes found in one point cloud: numbers in the frame and unit of its points, and what people do with them.

boxes = detector(points, colors, dataset="scannet")
boxes.of_class("chair", "table").of_score(0.5).save("room.html")
table = boxes.to_dataframe()
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from h2a2_jax.boxes.nms import Detections, suppress_across_classes
from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.inference.input_files import printable
from h2a2_jax.inference.results import PredictedScan, boxes_in_scan_frame, document_of, entry_of, in_file
from h2a2_jax.scans.frame import UNITS, UPRIGHT
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import DatasetSpec, labels_among

if TYPE_CHECKING:
    import pandas
    import PIL.Image

_FAR = 100.0  # m, from the origin; boxes beyond are shifted by whole metres before they are float32
_IN_A_NOTEBOOK = 60_000  # points
_SHOWN_ROWS, _SHOWN_CLASSES = 20, 4
_WITHOUT_POINTS = Scan(
    *("boxes", np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)),
    *(np.zeros((0, 7), np.float32), np.zeros(0, np.int32)),
)


@dataclass(frozen=True, eq=False, repr=False)
class Boxes:
    """Boxes found in one point cloud, in the frame and unit of its points, best first.

    A detector makes them; `Boxes(centers, sizes, yaws, scores, labels, names)` makes them of arrays, in their order.

    Where the ground of the points is tilted and was turned upright (`alignment`), sizes are along the upright axes and
    yaws about the upright z; `rotations`, `quaternions` and `corners` are in the frame of the points for any box.

    Attributes:
        centers: x, y, z of the middle.
        sizes: full sizes along the axes of the points, before the box is turned.
        yaws: radians, counter-clockwise about the axis that points up, seen from above; 0 for axis-aligned datasets.
        scores: confidence, 0 to 1.
        labels: index of the class among `class_names`.
        names: name of the class of each box.
        notes: counts of points that were left out or repaired, by kind.
        remarks: what was decided on the points, and what looks wrong: parts of sentences about the scan.
        class_names: names of the classes by label; by default those of the boxes.
        dataset: dataset whose head found the boxes; None: none.
        file: path of the file that the points are from; None: none.
        up: axis of the points that points up, a key of `UPRIGHT`.
        unit: unit of the points, a key of `UNITS`.
        alignment: rotation from the axes of tilted points to upright ones; None for points with an axis that is up.
        scan: the points in the frame that the detector works in, in metres, z up; without points for boxes of arrays.
        matrix: transform from the frame and unit of the points to that of the scan; None: a shift, if any, after the
            turn and the scale that `up`, `unit` and `alignment` say.
        rows: index of each point of the scan in the input; None: all points of the input, in order.
    """

    centers: Float[np.ndarray, "n 3"]
    sizes: Float[np.ndarray, "n 3"]
    yaws: Float[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    notes: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    dataset: str | None = None
    file: str | None = None
    up: str = "z"
    unit: str = "m"
    alignment: Float[np.ndarray, "3 3"] | None = None
    scan: Scan = _WITHOUT_POINTS
    matrix: Float[np.ndarray, "4 4"] | None = None
    rows: Int[np.ndarray, " m"] | None = None

    def __post_init__(self) -> None:
        """Fill in `class_names`; raise InputError where the columns do not fit one another."""
        columns = (self.centers, self.sizes, self.yaws, self.scores, self.labels, self.names)
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(str(len(column)) for column in columns)
            raise InputError(
                f"Centers, sizes, yaws, scores, labels, names are {lengths}; expected are as many of each."
            )
        if self.up not in UPRIGHT or self.unit not in UNITS:
            known = f"one of {', '.join(UPRIGHT)} in one of {', '.join(UNITS)}"
            raise InputError(f"The boxes have {self.up!r} up in {self.unit!r}; expected is {known}.")
        if self.class_names:
            if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
                reach = f"{self.labels.min()} to {self.labels.max()}"
                raise InputError(
                    f"The labels are {reach}; expected are 0 to {len(self.class_names) - 1}, by class_names."
                )
            return
        if len(self) and self.labels.min() < 0:
            raise InputError(f"A label is {self.labels.min()}; expected are 0 and more.")
        by_label = dict(zip(self.labels.tolist(), self.names, strict=True))
        names = tuple(by_label.get(label, f"class {label}") for label in range(max(by_label, default=-1) + 1))
        object.__setattr__(self, "class_names", names)

    @classmethod
    def of(
        cls,
        found: Detections,
        scan: Scan,
        matrix: Float[np.ndarray, "4 4"],
        spec: DatasetSpec,
        *,
        file: str | Path | None = None,
        notes: Mapping[str, int] | None = None,
        remarks: tuple[str, ...] = (),
        rows: Int[np.ndarray, " m"] | None = None,
    ) -> "Boxes":
        """Make boxes of what a detector found in a scan, best first; of equal scores in their order.

        Args:
            found: boxes in the frame of the scan.
            scan: the points, in metres, z up.
            matrix: transform from the frame and unit of the input to that of the scan, float64 for map coordinates.
            spec: dataset whose head found them; labels are indices of its classes.
            file: path of the input file.
            notes: counts of points that were left out or repaired; None: those of the scan.
            remarks: parts of sentences on the scan.
            rows: index of each point of the scan in the input; None: all points of the input, in order.

        Raises:
            ValueError: the matrix scales by no unit or mirrors, as that of an augmented scan may.
        """
        order = np.argsort(-found.scores, kind="stable")
        found = Detections(found.boxes[order], found.scores[order], found.labels[order])
        led = in_file(scan.name, matrix, found)
        boxes = led.detections.boxes
        return cls(
            *(boxes[:, :3], boxes[:, 3:6], boxes[:, 6], found.scores, found.labels),
            tuple(spec.classes[label] for label in found.labels),
            scan.notes if notes is None else notes,
            remarks,
            class_names=spec.classes,
            dataset=spec.name,
            file=None if file is None else printable(file),
            up=led.up,
            unit=led.unit,
            alignment=led.alignment,
            scan=scan,
            matrix=matrix.astype(np.float64),
            rows=rows,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator["Boxes"]:
        """Each box as a `Boxes` of length 1."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, chosen: Bool[np.ndarray, " n"] | Int[np.ndarray, " m"] | slice | int) -> "Boxes":
        """Boxes chosen by a mask, as in `boxes[boxes.scores > 0.5]`, an array of rows, a slice or an index."""
        rows = np.atleast_1d(np.arange(len(self))[chosen])
        columns = (self.centers, self.sizes, self.yaws, self.scores, self.labels)
        centers, sizes, yaws, scores, labels = (column[rows] for column in columns)
        names = tuple(self.names[row] for row in rows)
        return replace(self, centers=centers, sizes=sizes, yaws=yaws, scores=scores, labels=labels, names=names)

    def of_class(self, *names: str) -> "Boxes":
        """Boxes of some classes; spellings that differ in case, blanks, hyphens and underscores count.

        Raises:
            InputError: there is no such class among `class_names`.
        """
        labels = labels_among(names, self.class_names, self.dataset or printable(self.scan.name))
        return self[np.isin(self.labels, labels)]

    def of_score(self, lowest: float) -> "Boxes":
        """Boxes of at least this score."""
        return self[self.scores >= np.float32(lowest)]

    def suppress_across_classes(self, iou_threshold: float = 0.5) -> "Boxes":
        """Boxes without those that overlap a better one of whatever class, seen from above ("agnostic" suppression)."""
        found = self.detections
        return self[suppress_across_classes(found, iou_threshold, rotated=bool(found.boxes[:, 6].any()))]

    @property
    def counts(self) -> dict[str, int]:
        """Number of boxes by class, most first."""
        return dict(Counter(self.names).most_common())

    @property
    def dimensions(self) -> Float[np.ndarray, "n 3"]:
        """Length, width and height, whatever axis points up; the length is the longer side of the footprint."""
        upright = np.eye(3) if self.alignment is not None else np.abs(np.array(UPRIGHT[self.up], np.float64))
        sizes = self.sizes @ upright.T
        sizes[:, :2] = -np.sort(-sizes[:, :2], axis=1)
        return sizes

    @property
    def volumes(self) -> Float[np.ndarray, " n"]:
        """Volumes, in the unit of the points cubed."""
        return np.prod(self.dimensions, axis=1)

    @property
    def footprints(self) -> Float[np.ndarray, " n"]:
        """Areas seen from above, in the unit of the points squared."""
        return np.prod(self.dimensions[:, :2], axis=1)

    @property
    def rotations(self) -> Float[np.ndarray, "n 3 3"]:
        """Rotations: a corner is center + rotation @ (+-dx/2, +-dy/2, +-dz/2), also for tilted points."""
        return self._in_file().rotations

    @property
    def quaternions(self) -> Float[np.ndarray, "n 4"]:
        """The rotations as unit quaternions w, x, y, z."""
        return self._in_file().quaternions

    @property
    def corners(self) -> Float[np.ndarray, "n 8 3"]:
        """Corners in the frame and unit of the points, float64, numbered as in `boxes.codec.box_corners`."""
        return self._in_file().corners

    @property
    def to_scan(self) -> Float[np.ndarray, "4 4"]:
        """The transform from the frame and unit of the points to metres, z up: `matrix`, if there is one."""
        if self.matrix is not None:
            return self.matrix
        matrix = np.eye(4)
        matrix[:3, :3] = UNITS[self.unit] * (np.array(UPRIGHT[self.up]) if self.alignment is None else self.alignment)
        if len(self):
            middle = np.median(self.centers @ matrix[:3, :3].T, axis=0)
            matrix[:3, 3] = -np.round(middle) * (np.abs(middle) > _FAR)
        return matrix

    @property
    def detections(self) -> Detections:
        """The boxes in the frame of the scan, in metres, z up, float32."""
        boxes = boxes_in_scan_frame(self._in_file(), self.to_scan)
        return Detections(boxes.astype(np.float32), self.scores, self.labels)

    def to_entry(self) -> dict[str, Any]:
        """Return the entry of the scan in a document; see `h2a2_jax.inference.results`."""
        entry = entry_of(self._in_file(), self.class_names, self.dataset)
        if self.remarks:
            entry["remarks"] = [printable(remark) for remark in self.remarks]
        return entry

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `results`: what predictions.json holds, of one scan."""
        return document_of([self.to_entry()], self.dataset)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the document of `to_dict` as JSON, and write it to a file, if one is given."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        if path is not None:
            with whole_file(Path(path)) as part:
                part.write_text(text, encoding="utf-8")
        return text

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return a table with a row for each box: the columns of boxes.csv, then volume and footprint.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise InputError('A data frame needs pandas: pip install "h2a2_jax[table]".') from error

        number = len(self)
        columns: dict[str, Any] = {
            "scan": [self.scan.name] * number,
            "file": [self.file or ""] * number,
            "class": list(self.names),
            "label": self.labels,
            "score": self.scores,
            **{f"center_{axis}": self.centers[:, i] for i, axis in enumerate("xyz")},
            **{f"size_{axis}": self.sizes[:, i] for i, axis in enumerate("xyz")},
            "yaw": self.yaws,
            "upright": np.full(number, int(self.alignment is None)),
            "up": [self.up] * number,
            "unit": [self.unit] * number,
            **{f"q{axis}": self.quaternions[:, i] for i, axis in enumerate("wxyz")},
            "dataset": [self.dataset or ""] * number,
            "volume": self.volumes,
            "footprint": self.footprints,
        }
        return pandas.DataFrame(columns)

    def save(self, path: str | Path) -> Path:
        """Write the boxes to a file, in the format of its suffix, and return its path.

        .csv: a table, as boxes.csv. .json: the document of `to_dict`. .ply: frames of the boxes as a mesh, in the frame
        of the points (`save_points` has the points). .html: the viewer's page. .png: its picture. .glb: points and
        boxes as glTF. .dxf: boxes for CAD. .rrd: points and boxes for Rerun.

        The folder is made if missing; a file in the place is replaced when the new one is complete.

        Raises:
            InputError: the suffix is none of these, or a package that the format needs is not installed.
        """
        from h2a2_jax.inference.exports import EXPORTS, export_boxes  # here, for it knows this class

        path = Path(path)
        suffix = path.suffix.lower()
        writers: dict[str, Callable[[Path], object]] = {
            ".csv": self._save_table,
            ".json": self.to_json,
            ".ply": self._save_frames,
            ".html": self._save_page,
            ".png": self._save_picture,
            **{f".{kind}": lambda place: export_boxes(place, self) for kind in EXPORTS},
        }
        if suffix not in writers:
            known = ", ".join(writers)
            raise InputError(f"{printable(path)} has the suffix {suffix!r}; boxes are saved as one of {known}.")
        writers[suffix](path)
        return path

    def save_points(self, path: str | Path) -> Path:
        """Write the points as a binary PLY with the class, number and score of the box that each is in, and its index.

        The numbers are rows of these boxes; see `ply_results.write_points`.

        Raises:
            InputError: the boxes are of arrays, without points.
        """
        from h2a2_jax.inference.ply_results import write_points

        if not len(self.scan.points):
            raise InputError("There are no points to save: these boxes were made without a scan.")
        write_points(Path(path), self.scan, self.to_scan, self.detections, self.rows)
        return Path(path)

    def show(self) -> None:
        """Open a window of Open3D that shows points and boxes, and return when it is closed.

        Raises:
            InputError: Open3D, a library it needs, a graphics driver or a display is missing.
        """
        from h2a2_jax.viewer.window import show

        show(self, title=self._title, score=self._lowest)

    def plot(
        self, view: Literal["oblique", "top"] = "oblique", size: tuple[int, int] = (1400, 900)
    ) -> "PIL.Image.Image":
        """Return a picture of points and boxes, which notebooks show; no display is needed.

        Args:
            view: "oblique", in perspective from above; or "top", to scale.
            size: width and height in pixels.
        """
        from h2a2_jax.viewer.image import draw_image

        return draw_image(self, title=self._title, view=view, size=size, score=self._lowest)

    def __repr__(self) -> str:
        """Return number, classes and best box, as in "Boxes(12: 5 chair, 3 table; best chair 0.93)"."""
        if not len(self):
            return "Boxes(0)"
        counts = list(self.counts.items())
        shown = ", ".join(f"{count} {printable(name)}" for name, count in counts[:_SHOWN_CLASSES])
        more = ", ..." if len(counts) > _SHOWN_CLASSES else ""
        best = int(np.argmax(self.scores))
        return f"Boxes({len(self)}: {shown}{more}; best {printable(self.names[best])} {self.scores[best]:.2f})"

    def _repr_html_(self) -> str:
        """Return the viewer in a frame, for notebooks; a table where there are no points."""
        if not len(self.scan.points):
            return self._html_table()
        from h2a2_jax.viewer.scan_page import viewer_html

        page = viewer_html(self, **self._page_options(), max_points=_IN_A_NOTEBOOK, still=False)
        # Its scripts run apart from the notebook, whatever names it holds.
        return (
            f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" allow="clipboard-write; fullscreen" '
            f'title="{escape(repr(self))}" style="width: 100%; height: 560px; border: 0"></iframe>'
        )

    def _html_table(self) -> str:
        heads = ("class", "score", *("center x", "y", "z"), *("size x", "y", "z"), "yaw")
        lines = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
        for box in self[:_SHOWN_ROWS]:
            numbers = [*box.centers[0], *box.sizes[0], box.yaws[0]]
            cells = [escape(box.names[0]), f"{box.scores[0]:.2f}", *(f"{number:.2f}" for number in numbers)]
            lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        more = f"<p>and {len(self) - _SHOWN_ROWS} more</p>" if len(self) > _SHOWN_ROWS else ""
        return f"<p>{escape(repr(self))}</p><table>{''.join(lines)}</table>{more}"

    def _in_file(self) -> PredictedScan:
        columns = (self.centers, self.sizes, self.yaws[:, None])
        boxes = np.concatenate([column.astype(np.float64) for column in columns], axis=1)
        found = Detections(boxes, self.scores, self.labels)
        return PredictedScan(self.scan.name, found, self.up, self.unit, self.alignment, self.file)

    @property
    def _title(self) -> str:
        return self.scan.name if self.file is None else Path(self.file).name

    @property
    def _lowest(self) -> float:
        """The lowest score of a box, rounded down as pages show it."""
        return math.floor(100 * float(self.scores.min())) / 100 if len(self) else 0.0

    def _save_table(self, path: Path) -> None:
        from h2a2_jax.inference.box_table import csv_header, csv_text

        with whole_file(path) as part:
            part.write_bytes((csv_header() + csv_text(self.to_entry())).encode("utf-8", "replace"))

    def _save_frames(self, path: Path) -> None:
        from h2a2_jax.inference.ply_results import write_box_frames

        write_box_frames(path, self.to_scan, self.detections)

    def _page_options(self) -> dict[str, Any]:
        return {"title": self._title, "score": self._lowest, "note": frame_note(self.to_scan)}

    def _save_page(self, path: Path) -> None:
        from h2a2_jax.viewer.scan_page import write_viewer

        with whole_file(path) as part:
            write_viewer(part, self, **self._page_options())

    def _save_picture(self, path: Path) -> None:
        from h2a2_jax.viewer.image import write_image

        with whole_file(path) as part:
            write_image(part, self, title=self._title, score=self._lowest)


def frame_note(matrix: Float[np.ndarray, "4 4"]) -> str:
    """Return a sentence for a page whose numbers are not those of the file; "" where the frames are the same."""
    if np.allclose(matrix, np.eye(4), rtol=0, atol=1e-9):
        return ""
    if np.allclose(matrix[:3, :3], np.eye(3), rtol=0, atol=1e-9):
        shift = ", ".join(f"{value + 0:.2f}" for value in matrix[:3, 3])
        return f"Places on this page are those of the file plus ({shift}) m; JSON and CSV have those of the file."
    return "Numbers on this page are in metres with z up; JSON and CSV have those of the file."
