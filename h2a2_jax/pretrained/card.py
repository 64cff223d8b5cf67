"""The model card of a pretrained folder: facts about a detector, and the README.md that the Hugging Face hub shows."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.files import read_sealed
from h2a2_jax.scans.specs import DatasetSpec

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
"""Files of a pretrained folder."""
_EVALUATION = "evaluation.json"
_TAGS = ("3d-object-detection", "point-cloud", "indoor", "jax", "flax")


@dataclass(frozen=True)
class CardFacts:
    """Facts of a detector beside its config and its arrays, for its model card.

    Attributes:
        name: a name to show; "" for the name of the folder.
        source: address or file that the weights come from; "" for a training of one's own.
        license: identifier of the licence of the weights as the Hugging Face hub knows it, such as "apache-2.0";
            "other" where the terms of the data decide.
        terms: sentences on the licence of the weights and the data; "" where nothing is known.
        scores: mAP as a share, by dataset and IoU threshold, as {"scannet": {"0.25": 0.71}}.
        measured: where the scores come from, as the end of a sentence.
        steps: optimiser steps of the training; None where unknown.
        trained_by: command of the training; "" where unknown.
    """

    name: str = ""
    source: str = ""
    license: str = "other"
    terms: str = ""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: str = ""
    steps: int | None = None
    trained_by: str = ""

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "CardFacts":
        """Read facts from JSON values; those of another type, or of a later version, are left out."""
        given = values if isinstance(values, Mapping) else {}
        texts = {name: given[name] for name in _TEXTS if isinstance(given.get(name), str)}
        steps = given.get("steps")
        steps = steps if isinstance(steps, int) and not isinstance(steps, bool) else None
        return cls(**texts, scores=_scores(given.get("scores")), steps=steps)


_TEXTS = ("name", "source", "license", "terms", "measured", "trained_by")


def facts_of_run(run: Path, step: int) -> CardFacts:
    """Facts of the checkpoint of a step of a run: its scores, where evaluation.json has them, and its steps.

    Raises:
        InputError: evaluation.json is damaged.
    """
    places = {run / "evaluations" / str(step) / _EVALUATION: str(step), run / _EVALUATION: ""}
    file = next((file for file in places if file.exists()), None)
    scores: dict[str, dict[str, Any]] = {}
    if file is not None:
        try:
            for dataset, document in read_sealed(file, places[file]).items():
                scores[dataset] = {f"{level['iou']:g}": level["mAP"] for level in document["thresholds"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}, whose scores belong in the model card, is damaged ({quoted(error)}): evaluate again with "
                "--mode=eval, or remove it."
            ) from error
    return CardFacts(scores=_scores(scores), measured="the validation scans, by h2a2 eval", steps=step)


def _scores(values: Any) -> dict[str, dict[str, float]]:
    """Scores that are shares; anything else is left out."""
    if not isinstance(values, Mapping):
        return {}
    found = {
        str(dataset): {str(iou): float(share) for iou, share in levels.items() if _is_share(share)}
        for dataset, levels in values.items()
        if isinstance(levels, Mapping)
    }
    return {dataset: levels for dataset, levels in found.items() if levels}


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def model_card(
    facts: CardFacts,
    specs: Sequence[DatasetSpec],
    folder_name: str,
    versions: Mapping[str, str],
    label_space: str = "separate",
) -> str:
    """Text of README.md: a YAML head for the Hugging Face hub, and what a user of the weights must know.

    Args:
        facts: facts about the detector.
        specs: the datasets in the order of the heads.
        folder_name: name of the folder, which the commands name.
        versions: versions of packages by name that wrote the folder.
        label_space: "separate" heads of the datasets, or one head for the "union" of their classes.
    """
    name = facts.name or folder_name
    parts = [_front_matter(facts, specs, name), f"# {_plain(name)}", _introduction(facts, specs, label_space)]
    command = _quoted(facts.name or folder_name)
    parts += [
        "## Use",
        f"```sh\npip install h2a2_jax\nh2a2 predict room.ply --weights={command}\n```",
        f"```python\nimport h2a2_jax\n\ndetector = h2a2_jax.Detector.from_pretrained({json.dumps(name)})\n```",
        "Points are metres, z up; what a file has otherwise is found and turned.",
        "## Data and licence",
        _plain(facts.terms or "No licence is stated. The terms of the data that the weights were trained on apply."),
        "## Classes",
        *(f"- {_plain(s.name)}, {_boxes(s)}: {', '.join(map(_plain, s.classes))}" for s in specs),
    ]
    if facts.scores:
        parts += ["## Scores", _score_table(facts.scores)]
        parts += [f"Mean average precision (%) on {_plain(facts.measured)}."] if facts.measured else []
    parts += ["## Training", *_training(facts), f"Written by h2a2_jax {versions.get('h2a2_jax', 'unknown')}."]
    return "\n\n".join(_joined(parts)) + "\n"


def _joined(parts: Sequence[str]) -> list[str]:
    """Join the items of a list, which follow one another, to one part."""
    joined: list[str] = []
    for part in parts:
        if part.startswith("- ") and joined and joined[-1].startswith("- "):
            joined[-1] += f"\n{part}"
        else:
            joined.append(part)
    return joined


def _front_matter(facts: CardFacts, specs: Sequence[DatasetSpec], name: str) -> str:
    lines = ["---", f"license: {json.dumps(facts.license)}"]
    if facts.license == "other":
        lines += ['license_name: "terms-of-the-data"', 'license_link: "README.md#data-and-licence"']
    lines += ["library_name: h2a2_jax", "pipeline_tag: object-detection", "tags:"]
    lines += [f"- {tag}" for tag in (*_TAGS, *(json.dumps(spec.name) for spec in specs))]
    if facts.scores:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for dataset, levels in facts.scores.items():
        lines += ["  - task:", "      type: object-detection", "    dataset:"]
        lines += [f"      name: {json.dumps(dataset)}", f"      type: {json.dumps(dataset)}", "    metrics:"]
        for iou, share in levels.items():
            lines += [f"    - type: mAP@{iou}", f"      value: {100 * share:.1f}"]
    return "\n".join([*lines, "---"])


def _introduction(facts: CardFacts, specs: Sequence[DatasetSpec], label_space: str) -> str:
    heads = "one head" if len(specs) == 1 else f"{len(specs)} heads"
    if label_space == "union":
        heads = "one head for the classes of all datasets"
    data = ", ".join(_plain(spec.name) for spec in specs)
    source = f" The weights come from {_plain(facts.source)}." if facts.source else ""
    return f"A detector of objects in point clouds of rooms, with {heads} ({data}), for h2a2_jax.{source}"


def _boxes(spec: DatasetSpec) -> str:
    return "boxes with yaw" if spec.has_yaw else "boxes along the axes"


def _score_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    thresholds = sorted({iou for levels in scores.values() for iou in levels})
    lines = [
        "| dataset | " + " | ".join(f"mAP@{iou}" for iou in thresholds) + " |",
        "|---" * (1 + len(thresholds)) + "|",
    ]
    for dataset, levels in scores.items():
        cells = [f"{100 * levels[iou]:.1f}" if iou in levels else "" for iou in thresholds]
        lines.append(f"| {_plain(dataset)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _training(facts: CardFacts) -> list[str]:
    steps = f"{facts.steps:,} optimiser steps. " if facts.steps else ""
    config = "`config.json` holds the whole configuration."
    if facts.source:
        config = "Trained by another program; of the configuration in `config.json` the architecture alone is theirs."
    lines = [f"{steps}{config}"]
    if facts.trained_by:
        lines.append(f"```sh\n{_line(facts.trained_by)}\n```")
    return lines


def _quoted(name: str) -> str:
    """Name as a shell takes it."""
    return name if re.fullmatch(r"[\w./-]+", name) else "'" + _line(name).replace("'", "'\\''") + "'"


def _line(text: str) -> str:
    """Text in one line that ends no block of code."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("```", "")


def _plain(text: str) -> str:
    """Text in one line, without what Markdown or a table would act on."""
    return re.sub(r"([|<>`\[\]*])", r"\\\1", _line(text))
