"""A folded detector predicts what the whole one does."""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.inference.folding import fold
from h2a2_jax.layers import DatasetContext, ForwardContext
from tests.models.scenes import SELECTION, alive, batch_of, room, tiny_detector

DATASETS = 3
NEAR_TIE = 1e-5
CASES = {
    "default": (SELECTION, {}),
    "TR3D": (None, {"neck": "exclusive", "norm_affine": "exclusive"}),
    "everywhere": (
        replace(
            SELECTION, convolutions=("residual", "stem", "neck"), structure_parameters="exclusive", gate="before_norm",
            structural_features="input", scope="batch", embedding_start="random",
        ),
        {"norm_affine": "exclusive", "running_statistics": "shared"},
    ),
    "agreement": (
        replace(SELECTION, prior="agreement", consistency="centered_cosine", pooling="pairs", prototypes="kernels"),
        {},
    ),
    "all exclusive": (replace(SELECTION, kernels="exclusive", embedding_start="random"), {}),
    "embeddings of scans": (replace(SELECTION, scan_embedding=True, convolutions=("stem", "residual")), {}),
    "prompts and adapters": (None, {"norm_affine": "prompt", "adapters": True, "exclusive_stages": (0, 4)}),
    "prompts of scans": (replace(SELECTION, scan_embedding=True), {"norm_affine": "prompt"}),
    "embeddings of scans, gate first": (replace(SELECTION, scan_embedding=True, gate="before_norm"), {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    return batch_of([room(1), room(2)])


@cache
def trained(case):
    selection, options = CASES[case]
    return alive(tiny_detector(selection, seed=3, **options))


@partial(jax.jit, static_argnums=0)
def forward(graph, state, batch, dataset, head):
    """Predictions, and what kernel selection recorded; datasets of one structure share a program."""
    seen = {}

    def tap(name, value):
        if name.endswith((".alpha", ".beta", ".gamma")):
            seen[name] = value

    context = ForwardContext(dataset, algorithm="gather", tap=tap)  # compiles fastest
    return nnx.merge(graph, state)(batch.features, batch.plan, context, head), seen


def predictions(model, batch, dataset, head=None):
    """As numpy, and the smallest distance of a score from the threshold."""
    graph, state = nnx.split(model)
    out, seen = jax.device_get(forward(graph, state, batch, dataset, head))
    layers = [name.removesuffix(".beta") for name in seen if name.endswith(".beta")]
    scores = [seen[f"{layer}.alpha"] * seen[f"{layer}.beta"] for layer in layers]
    return out, min((np.abs(s - model.config.selection.tau).min() for s in scores), default=np.inf), seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "conditioning"),
    [
        *((case, "own") for case in CASES),
        *((case, c) for case in ("default", "prompts and adapters") for c in ("another", "mean", "shared kernels")),
    ],
)
def test_a_folded_detector_predicts_the_same(case, conditioning, batch):
    model, head = trained(case), 1
    dataset = {
        "own": DatasetContext.one(head, DATASETS),
        "another": DatasetContext.one(2, DATASETS),
        "mean": DatasetContext.mean(DATASETS),
        "shared kernels": replace(DatasetContext.one(head, DATASETS), kernels="shared"),
    }[conditioning]
    whole, margin, _ = predictions(model, batch, dataset, DatasetContext.one(head, DATASETS))
    folded = fold(model, dataset, head)
    ours, _, taps = predictions(folded, batch, DatasetContext.one(0, 1))
    assert margin > NEAR_TIE
    np.testing.assert_array_equal(ours.locations, whole.locations)
    for name in ("boxes", "logits"):
        expected = getattr(whole, name)
        assert np.ptp(expected[:, 0]) > 1e-4  # ReLUs leave something alive
        error = np.abs(getattr(ours, name) - expected).max() / np.abs(expected).max()
        assert error < 1e-5, (name, error)
    selects = case not in ("TR3D", "all exclusive", "prompts and adapters") and conditioning != "shared kernels"
    assert any(name.endswith(".gamma") for name in taps) == selects
    assert folded.heads_config == (model.heads_config[head],)


def test_only_what_depends_on_scans_is_left():
    model = trained("default")
    names = {
        ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(fold(model, DatasetContext.mean(3), 0)))
    }
    for gone in ("exclusive", "embedding", "norm", "gate", "mlp"):
        assert not any(gone in name.split(".") for name in names), gone
    assert {name.rsplit(".", 1)[-1] for name in names if "heads" not in name} == {
        "kernels", "bias", "phi", "theta", "alpha", "projection", "prototypes",
    }  # fmt: skip


def test_folding_does_not_change_the_model(batch):
    model = trained("default")
    before = jax.device_get(nnx.state(model))
    fold(model, DatasetContext.one(0, DATASETS), 0)
    after = jax.device_get(nnx.state(model))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before, after)
