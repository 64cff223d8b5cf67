"""The command `h2a2 weights`: what there is, what is in the cache, and downloads ahead of time."""

from collections.abc import Iterator, Mapping
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json
from h2a2_jax.pretrained.card import CONFIG_FILE, WEIGHTS_FILE, CardFacts
from h2a2_jax.pretrained.catalog import CATALOG, CatalogEntry, find_entry, unknown_name, weights_cache
from h2a2_jax.user_cache import CACHE_VARIABLE


def weights_command(name: str | None, download: bool = False) -> None:
    """Print the catalog, or one entry of it, or fetch that entry into the cache.

    Args:
        name: a name of the catalog; None lists all of them.
        download: True downloads and converts the weights, so that they load without a network.

    Raises:
        InputError: there are no weights of the name, or they cannot be had.
    """
    if name is None:
        if download:
            raise InputError(
                f"--download needs a name, as in h2a2 weights --download {CATALOG[-1].name}; h2a2 weights lists them."
            )
        print("\n".join(_table()), flush=True)
        return
    if (entry := find_entry(name)) is None:
        raise unknown_name(name)
    if download:
        from h2a2_jax.pretrained.load import load_entry

        load_entry(entry)
    print("\n".join(_description(entry)), flush=True)


def _table() -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("name", "dataset", "classes", "mAP@0.25", "mAP@0.5", "size", "here")]
    for entry in CATALOG:
        specs, scores = _heads(entry), _scores(entry)
        rows.append(
            (
                entry.name,
                ",".join(name for name, _ in specs) or "-",
                ",".join(str(len(classes)) for _, classes in specs) or "-",
                *(",".join(_score(scores, name, iou) for name, _ in specs) or "-" for iou in ("0.25", "0.5")),
                _size(entry),
                "yes" if _is_here(entry) else "no",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for entry in CATALOG:
        yield f"{entry.name}: {entry.summary}. {entry.license}"
        if entry.address:
            yield f"    address: {entry.address}"
        if _is_here(entry):
            yield f"    here: {entry.folder}"
    yield ""
    yield f"Scores are published mAP (%). Weights are kept in {weights_cache()}; {CACHE_VARIABLE} names another cache."
    yield "h2a2 predict room.ply --weights=NAME downloads them at first use, h2a2 weights --download NAME ahead of it."


def _description(entry: CatalogEntry) -> Iterator[str]:
    facts, scores = _facts(entry), _scores(entry)
    yield f"{entry.name}: {entry.summary}"
    for name, classes in _heads(entry):
        yield f"  {name}: {', '.join(classes)}"
        if levels := scores.get(name):
            listed = ", ".join(f"mAP@{iou} {100 * share:.1f}" for iou, share in levels.items())
            yield f"  {name}: {listed} on {facts.measured or 'the validation scans, as published'}"
    if facts.steps:
        yield f"  trained for {facts.steps:,} steps"
    if facts.trained_by:
        yield f"  trained by {facts.trained_by}"
    yield f"  licence: {facts.terms or entry.license}"
    if entry.address:
        yield f"  address: {entry.address}"
        yield f"  by hand: put the file at {entry.file}"
    yield f"  here: {f'{entry.folder} ({_size(entry)})' if _is_here(entry) else 'no'}"


def _is_here(entry: CatalogEntry) -> bool:
    return (entry.folder / WEIGHTS_FILE).is_file()


def _size(entry: CatalogEntry) -> str:
    """Size of the weights on this machine; before a download it is unknown."""
    for file in (entry.folder / WEIGHTS_FILE, entry.file):
        if file.is_file():
            return f"{file.stat().st_size / 1e6:.1f} MB"
    return "unknown" if entry.path else "-"


def _config(entry: CatalogEntry) -> Mapping[str, Any]:
    stored = read_json(entry.folder / CONFIG_FILE)
    return stored if isinstance(stored, dict) else {}


def _facts(entry: CatalogEntry) -> CardFacts:
    return CardFacts.from_json(_config(entry).get("facts"))


def _heads(entry: CatalogEntry) -> list[tuple[str, tuple[str, ...]]]:
    """Dataset and classes of each head: of the catalog, or as config.json of packaged weights has them."""
    if entry.datasets:
        return [(spec.name, spec.classes) for spec in entry.specs]
    return [(str(name), tuple(map(str, classes))) for name, classes in _config(entry).get("classes", {}).items()]


def _scores(entry: CatalogEntry) -> Mapping[str, Mapping[str, float]]:
    return entry.shares or _facts(entry).scores


def _score(scores: Mapping[str, Mapping[str, float]], dataset: str, iou: str) -> str:
    share = scores.get(dataset, {}).get(iou)
    return "-" if share is None else f"{100 * share:.1f}"
