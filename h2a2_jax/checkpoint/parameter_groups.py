"""Groups of parameters: by name for metrics, and those that are frozen.

Which parameters a run leaves as they are, by names: of groups, or the beginnings of paths.

    optim.freeze = ("stem", "layer1", "backbone.stages.1.0", "norms")   ->   paths of parameters   ->   masks of trees
                                                            (`frozen_paths`)            (`frozen_mask`)

Running statistics are no parameters: they follow the data, also behind frozen kernels.
"""

import difflib
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


GROUPS: Mapping[str, str] = {
    **PLACES,
    "backbone": r"^backbone\.",
    "heads": r"^heads\.",
    "embedding": r"^embedding$",
    **KINDS,
    "exclusive_kernels": r"\.conv\.exclusive$",
}
"""Groups that may be frozen: places, with what is exclusive there, and kinds; "kernels" are those that no selection
keeps to a dataset, "exclusive_kernels" the others. Beside them there are "shared" and "exclusive", all parameters
without and with a dataset axis."""

_BY_AXIS = ("shared", "exclusive")


def frozen_paths(shared: Any, exclusive: Any, entries: Sequence[str]) -> frozenset[str]:
    """Paths of the parameters that the entries name.

    Args:
        shared: tree of the parameters that datasets share; shapes will do.
        exclusive: tree of the others; their paths are other ones.
        entries: each one of `GROUPS`, "shared", "exclusive", or a path or its beginning up to a dot, such as
            "backbone.stages.0".

    Raises:
        InputError: an entry names no parameter of the model, or all together name every one.
    """
    by_axis = dict(zip(_BY_AXIS, (flat_names(shared), flat_names(exclusive)), strict=True))
    every = [*by_axis["shared"], *by_axis["exclusive"]]
    found: set[str] = set()
    for entry in entries:
        matching = by_axis[entry] if entry in by_axis else _named(entry, every)
        if not matching:
            raise InputError(_no_parameter(entry, every))
        found.update(matching)
    if found and len(found) == len(every):
        raise InputError(
            f"optim.freeze is {', '.join(entries)}, which is every parameter, so that nothing would be trained: leave "
            "a part of the model out of it."
        )
    return frozenset(found)


def frozen_mask(tree: Any, frozen: Collection[str]) -> Any:
    """The tree with True in place of frozen parameters and False of others."""
    return jax.tree.unflatten(jax.tree.structure(tree), [name in frozen for name in flat_names(tree)])


def without_frozen_gradients(tree: Any, frozen: Collection[str]) -> Any:
    """Parameters through which no gradient reaches the frozen ones, for the start of a loss.

    Their gradients are then zero, so that they count neither in the norm by which gradients are clipped nor for a
    balancer, and what would compute them is left out of the compiled step.
    """
    mask = frozen_mask(tree, frozen)
    return jax.tree.map(lambda leaf, is_frozen: lax.stop_gradient(leaf) if is_frozen else leaf, tree, mask)


def frozen_text(shared: Any, exclusive: Any, frozen: Collection[str]) -> str:
    """One line on how much is frozen and where; numbers count every dataset's, with the padding of heads."""
    sizes = {
        name: math.prod(leaf.shape)
        for tree in (shared, exclusive)
        for name, leaf in zip(flat_names(tree), jax.tree.leaves(tree), strict=True)
    }
    held = sum(size for name, size in sizes.items() if name in frozen)
    whole, part = Counter(map(place_of, sizes)), Counter(place_of(name) for name in sizes if name in frozen)
    places = [place if part[place] == count else f"{place} in part" for place, count in whole.items() if part[place]]
    where = f": {', '.join(places)}" if places else ""
    return f"Frozen: {held:,} of {sum(sizes.values()):,} parameters{where}."


def _named(entry: str, names: Sequence[str]) -> list[str]:
    if entry in GROUPS:
        return [name for name in names if re.search(GROUPS[entry], name)]
    return [name for name in names if f"{name}.".startswith(f"{entry}.")]


def _no_parameter(entry: str, names: Sequence[str]) -> str:
    """What is wrong with an entry that names none of a model's parameters, as a sentence."""
    groups = [*(group for group in GROUPS if _named(group, names)), *_BY_AXIS]
    if entry in GROUPS or entry in _BY_AXIS:
        return f"optim.freeze has {entry!r}, of which this model (see model.selection) has no parameters: leave it out."
    parts = [name.split(".") for name in names]
    beginnings = {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}
    near = difflib.get_close_matches(entry, [*groups, *sorted(beginnings.difference(groups))])
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of them."
    return (
        f"optim.freeze has {entry!r}, which names no parameter; expected are groups ({', '.join(groups)}) or "
        f"beginnings of paths such as 'backbone.stages.0': {hint}"
    )
