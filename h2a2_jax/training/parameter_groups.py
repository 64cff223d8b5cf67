"""What a gradient balancer recorded, summed up by groups of parameters."""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from h2a2_jax.training.checkpoint_tree import flat_names
from h2a2_jax.training.harmonize import HarmonizationState

PLACES: Mapping[str, str] = {
    "stem": r"^backbone\.stem\.",
    **{f"layer{stage + 1}": rf"^backbone\.stages\.{stage}\." for stage in range(4)},
    "neck": r"^neck\.",
    "scan_embedding": r"^backbone\.scan_embedding\.",
}
"""Where in the detector a parameter is: name of a group, pattern of the paths in it."""

KINDS: Mapping[str, str] = {
    "kernels": r"\.conv\.(kernel|shared)$",
    "norms": r"\.norm\.(scale|bias)$",
    "selection": r"\.(prior|prototypes|projection)$",
    "modulation": r"\.modulation\.",
    "gates": r"\.gate\.",
}
"""What a parameter is: kernels that datasets share; affine parts of norms; validity prior, prototypes and projection of
the kernel selection; linear modulation; channel gates. The scan embedding's parameters are of no kind."""


def place_of(path: str) -> str:
    """The one of `PLACES` that a parameter is in; else the first name of its path, as "heads" or "embedding"."""
    return next((place for place, pattern in PLACES.items() if re.search(pattern, path)), path.split(".", 1)[0])


def group_summary(
    record: HarmonizationState,
    dataset_names: Sequence[str],
    threshold: float,
    groups: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Agreement, norms and factors of the last step by groups of parameters, for a line of metrics.

    On the host; the record is fetched at once. With a record of scope "global" there is one group, "all".

    Args:
        record: of a balancer (`recorded`).
        dataset_names: in the order of the dataset axis.
        threshold: Psi below which NGH scales the gradients of a tensor.
        groups: pattern of the parameters' paths by name of the group; groups without a parameter are left out. By
            default `PLACES` and `KINDS`.

    Returns:
        For each group: "psi/<group>", the mean of Psi over its tensors; "harmonized_share/<group>", the share of its
        tensors whose Psi is below the threshold, whether the method scales them or not; and for each dataset
        "gradient_norm/<group>/<dataset>", the norm over all its tensors, 0 for an absent dataset, and
        "scale/<group>/<dataset>", the geometric mean of the factors.
    """
    record = jax.device_get(record)
    is_global = jax.tree_util.treedef_is_leaf(jax.tree.structure(record.psi))
    members = {"all": [0]} if is_global else _members(flat_names(record.psi), groups or {**PLACES, **KINDS})
    psi, norms, scales = (np.array(jax.tree.leaves(part), np.float64) for part in record[:3])
    values: dict[str, float] = {}
    for group, rows in members.items():
        values[f"psi/{group}"] = float(psi[rows].mean())
        values[f"harmonized_share/{group}"] = float((psi[rows] < threshold).mean())
        norm = np.sqrt((norms[rows] ** 2).sum(0))
        scale = np.exp(np.log(scales[rows]).mean(0))
        for k, dataset in enumerate(dataset_names):
            values[f"gradient_norm/{group}/{dataset}"] = float(norm[k])
            values[f"scale/{group}/{dataset}"] = float(scale[k])
    return values


def _members(names: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[int]]:
    """Rows of each group's tensors."""
    rows = {group: [i for i, name in enumerate(names) if re.search(pattern, name)] for group, pattern in groups.items()}
    return {group: found for group, found in rows.items() if found}
