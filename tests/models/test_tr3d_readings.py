"""Effects of the detector's options: layers that select, a shared or exclusive neck, embeddings of scans."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.models import TR3D, HeadConfig, selective_layers
from h2a2_jax.scans.specs import SPECS
from tests.models.scenes import SELECTION, alive, batch_of, room, tiny_config, tiny_detector


@cache
def batches():
    """Two scans together, and each alone."""
    return batch_of([room(1), room(2)]), batch_of([room(1)]), batch_of([room(2)])


def logits(model, batch, dataset=0, scan=None):
    """Of the locations of a scan, or of all."""
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state):
        context = ForwardContext(DatasetContext.one(dataset, 3), algorithm="gather")
        return nnx.merge(graph, state)(batch.features, batch.plan, context)

    out = forward(state)
    rows = np.asarray(out.valid(2)) if scan is None else np.asarray(out.scan) == scan
    return np.asarray(out.logits)[rows]


@pytest.mark.parametrize(
    ("parts", "count"), [(("residual",), 8), (("stem",), 1), (("neck",), 4), (("residual", "stem", "neck"), 13)]
)
def test_which_convolutions_select_their_kernels(parts, count):
    model = nnx.eval_shape(lambda: fresh_tiny_detector(replace(SELECTION, convolutions=parts)))
    names = list(selective_layers(model))
    assert len(names) == count
    for part, prefix in (("stem", "stem"), ("residual", "layer"), ("neck", "neck")):
        assert any(name.startswith(prefix) for name in names) == (part in parts)


def fresh_tiny_detector(selection, **options):
    heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in SPECS]
    return TR3D(replace(tiny_config(selection), **options), heads, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("choice", ["shared", "exclusive"])
def test_neck_is_shared_or_exclusive(choice):
    model = nnx.eval_shape(lambda: fresh_tiny_detector(None, neck=choice, norm_affine=choice))
    for part in (part for step in model.neck.steps for part in (step.up, step.lateral, step.out)):
        for variable in (part.conv.kernel, part.norm.scale, part.norm.bias):
            assert (variable.get_metadata().get("dataset_axis") == 0) == (choice == "exclusive")
        assert part.conv.kernel.shape == (*((3,) if choice == "exclusive" else ()), 27, 4, 4)


def test_an_exclusive_neck_tells_datasets_apart():
    model, (_, alone, _) = alive(tiny_detector(None, seed=4, neck="exclusive")), batches()
    # The rest of what a dataset has for itself is made equal.
    for _, module in nnx.iter_modules(model):
        for name in ("mean", "var", "class_kernel", "class_bias"):
            if hasattr(module, name):
                variable = getattr(module, name)
                variable[...] = np.tile(variable[...][:1], (3, *[1] * (variable.ndim - 1)))
    first, second = (logits(model, alone, dataset) for dataset in (0, 1))
    assert np.ptp(first) > 1e-3 and np.abs(first - second).max() > 1e-3


def test_a_scan_adds_a_residual_to_the_embedding_of_its_dataset():
    plain = tiny_detector(SELECTION, seed=4)
    finer = tiny_detector(replace(SELECTION, scan_embedding=True), seed=4)
    assert plain.backbone.scan_embedding is None
    together, first, second = batches()
    residual = finer.backbone.scan_embedding.out
    assert np.abs(residual.kernel[...]).max() > 0  # the tests' detector draws what starts at zero
    ours = logits(finer, together, scan=0)
    np.testing.assert_allclose(ours, logits(finer, first, scan=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logits(finer, together, scan=1), logits(finer, second, scan=0), rtol=1e-3, atol=1e-4)
    with_residual = logits(finer, first)
    residual.kernel[...] = np.zeros(residual.kernel.shape)
    without = logits(finer, first)
    assert np.abs(with_residual - without).max() > 1e-4
    as_drawn = nnx.merge(*nnx.split(finer))
    as_drawn.backbone.scan_embedding = None
    np.testing.assert_allclose(without, logits(as_drawn, first), rtol=1e-5, atol=1e-6)
