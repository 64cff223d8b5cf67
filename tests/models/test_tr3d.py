from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.errors import InputError
from h2a2_jax.layers import DatasetContext, ForwardContext, SelectionConfig, SelectiveConv
from h2a2_jax.loader.batching import collate
from h2a2_jax.losses import detection_loss
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig, LevelSizes
from h2a2_jax.scans.specs import SCANNET, SPECS
from h2a2_jax.training.gradients import targets_of
from tests.models.scenes import MODEL, SELECTION, VOXEL, batch_of, empty_scan, room, tiny_config, tiny_detector

DATASET = 1


@cache
def detector(selection=SELECTION):
    model = tiny_detector(selection)
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, batch):
        context = ForwardContext(DatasetContext.one(DATASET, len(SPECS)))
        return nnx.merge(graph, state)(batch.features, batch.plan, context)

    return model, lambda batch: jax.device_get(forward(state, batch))


def of_scan(out, scan):
    """(location, level) -> outputs, for one scan."""
    rows = np.flatnonzero(out.scan == scan)
    return out.locations[rows], out.level[rows], out.boxes[rows], out.logits[rows]


def capacities_of(*batches, more=32):
    sizes = [collate(scans, MODEL).tables.sizes for scans in batches]
    return LevelSizes(*(max(s) + more for s in zip(*sizes, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("selection", [SELECTION, None], ids=["selection", "plain"])
def test_padding_and_other_scans_change_nothing(selection):
    _, forward = detector(selection)
    alone = of_scan(forward(batch_of([room(0)])), 0)
    assert len(alone[0]) > 50 and np.ptp(alone[3]) > 1e-3
    pair = [room(0), room(1, points=2000)]
    tight = capacities_of(pair, more=0)  # one program for all pairs of scans
    company = {
        "a larger bucket": ([room(0)], 0, capacities_of([room(0)], more=700)),
        "beside another": (pair, 0, tight),
        "second": (pair[::-1], 1, tight),
        "after an empty one": ([empty_scan(), room(0)], 1, tight),
    }
    for name, (scans, scan, capacities) in company.items():
        there = of_scan(forward(batch_of(scans, capacities)), scan)
        np.testing.assert_array_equal(there[0], alone[0], err_msg=name)
        np.testing.assert_array_equal(there[1], alone[1])
        for ours, theirs in zip(there[2:], alone[2:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)


def test_locations_are_voxel_corners_of_two_levels():
    _, forward = detector()
    batch = batch_of([room(0), empty_scan()])
    out = forward(batch)
    assert set(out.scan) == {0, 2}
    for level, stride in ((0, 16), (1, 32)):
        rows = (out.level == level) & (out.scan == 0)
        corners = out.locations[rows] / (stride * VOXEL)
        np.testing.assert_allclose(corners, np.round(corners), atol=1e-4)
        sites = batch.plan.ups[1 - level].lateral.outputs
        assert rows.sum() == sites.n
    assert (out.boxes[:, 3:6] > 0).all() and out.boxes.shape[1] == 8 and out.logits.shape[1] == 18


@cache
def loss_slopes():
    graph, params, stats = nnx.split(tiny_detector(), nnx.Param, nnx.BatchStat)
    targets = targets_of(SPECS, DetectorConfig())

    @jax.jit
    def slopes(features, batch):
        def loss(params, features):
            model = nnx.merge(graph, params, stats, copy=True)
            context = ForwardContext(DatasetContext.one(DATASET, len(SPECS)), training=True)
            out = model(features, batch.plan, context)
            losses = detection_loss(
                out.locations, out.scan, out.level, out.boxes, out.logits, batch.boxes, batch.labels,
                targets.label_to_level[DATASET], targets.class_mask[DATASET], targets.has_yaw[DATASET],
            )  # fmt: skip
            return losses.total, (losses, nnx.state(model, nnx.BatchStat))

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, features)

    return slopes


FEW = {
    "rooms": lambda: [room(0), room(1)],
    "an empty scan": lambda: [room(0), empty_scan()],
    "no scan with points": lambda: [empty_scan(), empty_scan()],
    "no ground truth": lambda: [replace(room(s), boxes=np.zeros((0, 7), np.float32), labels=np.zeros(0, np.int32))
                                for s in (0, 1)],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scans", FEW)
@pytest.mark.parametrize("colors", ["as they are", "black"])
def test_gradients_are_finite(scans, colors):
    capacities = capacities_of([room(0), room(1)])
    batch = batch_of(FEW[scans](), capacities)
    features = batch.features * (colors != "black")
    (loss, (losses, stats)), (gradient, features_gradient) = loss_slopes()(features, batch)
    assert np.isfinite(loss)
    for tree in (gradient, features_gradient, stats):
        for path, leaf in jax.tree.leaves_with_path(tree):
            assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    assert (features_gradient[int(batch.plan.voxels.n) :] == 0).all()
    if "rooms" not in scans and scans != "an empty scan":
        assert losses.num_positives == 0 and losses.box == 0
    else:
        assert losses.num_positives > 0 and losses.box > 0
    own = {name: np.abs(np.asarray(v)) for name, v in named(gradient).items() if "exclusive" in name or "heads" in name}
    assert own
    for name, value in own.items():
        assert (np.delete(value, DATASET, 0) == 0).all(), name
        if scans == "rooms" and colors != "black" and "kernel" in name:
            assert value[DATASET].max() > 0, name


def named(state):
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def test_the_full_detector_has_the_published_number_of_parameters():
    head = [HeadConfig(SCANNET.name, SCANNET.num_classes, SCANNET.num_outputs)]
    shapes = nnx.eval_shape(lambda: TR3D(DetectorConfig(), head, rngs=nnx.Rngs(0)))
    sizes = {path: v.size for path, v in named_variables(shapes)}
    padded_outputs = (128 + 1) * (8 - SCANNET.num_outputs)
    assert round((sum(sizes.values()) - padded_outputs) / 1e6, 2) == 14.66


def named_variables(model):
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def test_selection_adds_kernels_of_each_dataset_to_the_residual_convolutions_only():
    heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in SPECS]
    config = DetectorConfig(selection=SelectionConfig())
    shapes = nnx.eval_shape(lambda: TR3D(config, heads, rngs=nnx.Rngs(0)))
    selective = [path for path, m in nnx.iter_modules(shapes) if isinstance(m, SelectiveConv)]
    assert len(selective) == 2 * (3 + 4 + 6 + 3)
    assert {path[:2] for path in selective} == {("backbone", "stages")}
    assert shapes.embedding.shape == (3, 64)


def test_taps_name_every_stage():
    model, _ = detector()
    batch, taps = batch_of([room(0)]), {}
    graph, state = nnx.split(model)

    def forward(state):
        context = ForwardContext(DatasetContext.one(0, 3), tap=lambda name, _: taps.setdefault(name))
        return nnx.merge(graph, state)(batch.features, batch.plan, context)

    jax.eval_shape(forward, state)
    blocks = {f"layer{s}_{b}" for s in range(1, 5) for b in range(1)}
    kernels = {f"{block}.conv{c}.{part}" for block in blocks for c in (1, 2) for part in ("alpha", "beta", "gamma")}
    assert set(taps) == {
        "conv1", "stem", "maxpool", *blocks, *kernels, *(f"layer{s}" for s in range(1, 5)),
        *(f"layer{s}_0_downsample" for s in range(1, 5)),
        *(f"{part}_{level}" for part in ("union", "lateral_block", "out_block") for level in (0, 1)),
        "up_block_1", "up_block_2",
    }  # fmt: skip


def test_an_unknown_depth_is_refused():
    with pytest.raises(InputError, match="depth 10, 18 or 34"):
        TR3D(replace(tiny_config(), depth=50), [HeadConfig("a", 2, 6)], rngs=nnx.Rngs(0))


def test_heads_read_only_their_own_outputs():
    model, _ = detector()
    heads = model.heads
    for d, spec in enumerate(SPECS):
        assert (heads.class_kernel[d, :, spec.num_classes :] == 0).all()
        assert (heads.box_kernel[d, :, spec.num_outputs :] == 0).all()
        np.testing.assert_allclose(jax.nn.sigmoid(heads.class_bias[d, : spec.num_classes]), 0.01, rtol=1e-5)
    assert (heads.box_bias[...] == 0).all()
    boxes, logits = heads(jnp.ones((4, 4)), DatasetContext.one(0, 3))
    np.testing.assert_allclose(boxes[:, 3:6], np.exp(heads.box_kernel[0].sum(0)[3:6])[None].repeat(4, 0), rtol=1e-5)
    np.testing.assert_allclose(logits[:, :18], logits[:1, :18].repeat(4, 0))
