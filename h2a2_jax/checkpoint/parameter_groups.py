"""Groups of parameters by name: for metrics by group, for freezing, and for learning rates of their own.

    optim.freeze = ("stem", "layer1", "backbone.stages.1.0", "*.prior")  ->   paths of parameters   ->   masks of trees
                                                             (`frozen_paths`)            (`frozen_mask`)

Running statistics are no parameters: they follow the data, also behind frozen kernels.
"""

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.errors import InputError

PLACES: Mapping[str, str] = {
    "stem": r"^backbone\.stem\.",
    **{f"layer{stage + 1}": rf"^backbone\.stages\.{stage}\." for stage in range(4)},
    "neck": r"^neck\.",
    "scan_embedding": r"^backbone\.scan_embedding\.",
}
"""Parts of the detector that hold shared parameters: name, and pattern of the paths in it."""

KINDS: Mapping[str, str] = {
    "kernels": r"\.conv\.(kernel|shared)$",
    "norms": r"\.norm\.(scale|bias)$",
    "selection": r"\.(prior|prototypes|projection)$",
    "modulation": r"\.modulation\.",
    "gates": r"\.gate\.",
    "prompts": r"\.norm\.prompt\.",
}
"""Kinds of shared parameters: kernels; affine parts of norms; validity prior, prototypes and projection of the kernel
selection; linear modulation; channel gates; maps of prompt-driven norms. The scan embedding's parameters are of no
kind."""

GROUPS: Mapping[str, str] = {
    **PLACES,
    "backbone": r"^backbone\.",
    "heads": r"^heads\.",
    "embedding": r"^embedding$",
    **KINDS,
    "exclusive_kernels": r"\.conv\.exclusive$",
    "adapters": r"\.conv\.adapter$",
}
"""Groups that can be frozen: places with their exclusive parameters, and kinds. "kernels" are the shared kernels,
"exclusive_kernels" those of kernel selection, "adapters" the residual adapters. `frozen_paths` adds "shared" and
"exclusive": all parameters without and with a dataset axis."""

_AXES = ("shared", "exclusive")


def place_of(path: str) -> str:
    """Return the one of `PLACES` that a parameter is in; else the first name of its path, as "heads" or "embedding"."""
    return next((place for place, pattern in PLACES.items() if re.search(pattern, path)), path.split(".", 1)[0])


def frozen_paths(shared: Any, exclusive: Any, entries: Sequence[str]) -> frozenset[str]:
    """Find the paths of the parameters that the entries of `optim.freeze` name: some, but not all.

    Entries are those of `named_paths`.
    """
    found = named_paths(shared, exclusive, entries, "optim.freeze")
    if found and len(found) == len(flat_names(shared)) + len(flat_names(exclusive)):
        raise InputError(
            f"optim.freeze is {', '.join(entries)}, which is every parameter, so that nothing would be trained: leave "
            "a part of the model out of it."
        )
    return found


def named_paths(shared: Any, exclusive: Any, entries: Sequence[str], key: str) -> frozenset[str]:
    """Find the paths of the parameters that entries name.

    An entry is one of `GROUPS`, "shared", "exclusive", a path or its beginning up to a dot, such as
    "backbone.stages.0", or a pattern in which a star stands for any characters, such as "*.prior". The leaves of the
    trees may be shapes.

    Args:
        shared: parameters without a dataset axis.
        exclusive: parameters with one.
        entries: what is named.
        key: key of the config, for the error message.

    Raises:
        InputError: an entry names no parameter.
    """
    by_axis = dict(zip(_AXES, (flat_names(shared), flat_names(exclusive)), strict=True))
    every = [*by_axis["shared"], *by_axis["exclusive"]]
    matching = {entry: by_axis.get(entry) or _matching(entry, every) for entry in entries}
    if unknown := [entry for entry, names in matching.items() if not names]:
        raise InputError(_unknown_entry(unknown[0], every, key))
    return frozenset().union(*matching.values())


def frozen_mask(tree: Any, frozen: Collection[str]) -> Any:
    """Return the tree with True in place of frozen parameters and False in place of the others."""
    return jax.tree.unflatten(jax.tree.structure(tree), [name in frozen for name in flat_names(tree)])


def without_frozen_gradients(tree: Any, frozen: Collection[str]) -> Any:
    """Stop gradients at the frozen parameters, at the start of a loss.

    Their gradients are then zero: they count neither in the norm by which gradients are clipped nor for a balancer, and
    the compiled step leaves out what would compute them.
    """
    mask = frozen_mask(tree, frozen)
    return jax.tree.map(lambda leaf, is_frozen: lax.stop_gradient(leaf) if is_frozen else leaf, tree, mask)


def frozen_text(shared: Any, exclusive: Any, frozen: Collection[str]) -> str:
    """One line with the number and the places of frozen parameters, those of all datasets and the padding of heads."""
    sizes = {
        name: math.prod(leaf.shape)
        for tree in (shared, exclusive)
        for name, leaf in zip(flat_names(tree), jax.tree.leaves(tree), strict=True)
    }
    count = sum(size for name, size in sizes.items() if name in frozen)
    whole, part = Counter(map(place_of, sizes)), Counter(place_of(name) for name in sizes if name in frozen)
    places = [place if part[place] == total else f"{place} in part" for place, total in whole.items() if part[place]]
    where = f": {', '.join(places)}" if places else ""
    return f"Frozen: {count:,} of {sum(sizes.values()):,} parameters{where}."


def _matching(entry: str, names: Sequence[str]) -> list[str]:
    if entry in GROUPS:
        return [name for name in names if re.search(GROUPS[entry], name)]
    if "*" in entry:
        return [name for name in names if fnmatch.fnmatchcase(name, entry)]
    return [name for name in names if f"{name}.".startswith(f"{entry}.")]


def _unknown_entry(entry: str, names: Sequence[str], key: str) -> str:
    """Error message for an entry that names none of the parameters."""
    groups = [*(group for group in GROUPS if _matching(group, names)), *_AXES]
    if entry in GROUPS or entry in _AXES:
        return f"{key} has {entry!r}, but this model (see model.selection) has no such parameters: leave it out."
    parts = [name.split(".") for name in names]
    beginnings = {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}
    near = difflib.get_close_matches(entry, [*groups, *sorted(beginnings.difference(groups))])
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of them."
    return (
        f"{key} has {entry!r}, which names no parameter; expected are groups ({', '.join(groups)}), patterns with * or "
        f"beginnings of paths such as 'backbone.stages.0': {hint}"
    )
