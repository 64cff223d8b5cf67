"""Ways to share a detector: parameters that each dataset has, values at the start, combinations that are refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.checkpoint.train_state import split_model
from h2a2_jax.checkpoint.tree import flat_names, host_arrays
from h2a2_jax.config import ExperimentConfig, SourceConfig
from h2a2_jax.errors import InputError
from h2a2_jax.initialization import count_parameters
from h2a2_jax.layers import PromptNorm
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig
from h2a2_jax.scans.specs import SPECS
from tests.models.scenes import SELECTION, tiny_config

STAGES = tuple(f"backbone.stages.{stage}." for stage in range(4))
EVERYTHING = {"exclusive_stages": (1, 2, 3, 4), "neck": "exclusive", "norm_affine": "exclusive"}


def detector(selection=None, **options):
    heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in SPECS]
    return TR3D(replace(tiny_config(selection), **options), heads, rngs=nnx.Rngs(0))


def shapes(**options):
    """Shapes of exclusive and of shared parameters by path, heads left out."""
    _, exclusive, shared, _ = split_model(nnx.eval_shape(lambda: detector(**options)))
    return tuple(
        {name: leaf.shape for name, leaf in zip(flat_names(tree), jax.tree.leaves(tree), strict=True)
         if not name.startswith("heads")} for tree in (exclusive, shared)
    )  # fmt: skip


def test_each_way_makes_these_parameters_a_datasets_own():
    plain, common = shapes()
    assert plain == {}
    own, shared = shapes(norm_affine="prompt", prompt_dim=6)
    assert own == {"embedding": (3, 6)}
    norms = {name.removesuffix("scale") for name in common if name.endswith("norm.scale")}
    prompts = {f"{norm}prompt.{part}": shape for norm in norms for part, shape in (("kernel", (6, 8)), ("bias", (8,)))}
    assert len(norms) == 19 and shared == common | prompts
    own, shared = shapes(adapters=True)
    assert own == {f"{stage}0.second.conv.adapter": (3, 4, 4) for stage in STAGES} and shared == common
    own, shared = shapes(exclusive_stages=(4,))
    assert own == {name: (3, *shape) for name, shape in common.items() if name.startswith(STAGES[3])}
    assert shared == {name: shape for name, shape in common.items() if name not in own}
    own, shared = shapes(exclusive_stages=(0,))
    assert set(own) == {"backbone.stem.conv.kernel", "backbone.stem.norm.scale", "backbone.stem.norm.bias"}
    own, shared = shapes(**EVERYTHING)
    assert set(shared) == {"backbone.stem.conv.kernel"} and len(own) == len(common) - 1


def test_selection_gives_prompts_its_embeddings():
    own, shared = shapes(selection=SELECTION, norm_affine="prompt")
    assert own["embedding"] == (3, SELECTION.embedding_dim)
    assert shared["neck.steps.0.out.norm.prompt.kernel"] == (SELECTION.embedding_dim, 8)


def test_adapters_and_prompts_stay_out_of_exclusive_stages():
    own, shared = shapes(adapters=True, norm_affine="prompt", exclusive_stages=(1, 4))
    assert {name for name in own if name.endswith("adapter")} == {
        f"{stage}0.second.conv.adapter" for stage in STAGES[1:3]
    }
    assert not any(name.startswith((STAGES[0], STAGES[3])) for name in shared)
    model = nnx.eval_shape(lambda: detector(norm_affine="prompt", exclusive_stages=(1,), running_statistics="shared"))
    assert not isinstance(model.backbone.stages[0][0].first.norm, PromptNorm)
    assert all(part.shared_statistics for part in (model.backbone.stem.norm, model.backbone.stages[0][0].first.norm))


def test_prompts_and_adapters_start_as_the_plain_network_of_the_same_seed_bit_for_bit():
    arrays = [host_arrays(nnx.state(detector(**options), nnx.Param)) for options in (
        {}, {"norm_affine": "prompt", "adapters": True}, {"exclusive_stages": (2,)})]  # fmt: skip
    plain, ours, staged = arrays
    for name, value in plain.items():
        np.testing.assert_array_equal(ours[name], value)
        if not name.startswith(STAGES[1]):
            np.testing.assert_array_equal(staged[name], value)
    added = {name: value for name, value in ours.items() if name not in plain}
    assert {name for name, value in added.items() if value.any()} == {"embedding"}
    kernels = staged[f"{STAGES[1]}0.first.conv.kernel"]
    assert kernels.shape == (3, 27, 4, 4) and (kernels[0] != kernels[1]).all()  # drawn apart


def experiment(depth=10, **options):
    sources = tuple(SourceConfig(s.name, kind="synthetic") for s in SPECS)
    return ExperimentConfig(sources, DetectorConfig(depth, **options))


def test_parameters_are_counted():
    plain = count_parameters(experiment(depth=34))
    channels = 64 + 7 * 64 + 29 * 128 + 6 * 128  # of the norms of stem, stages and neck
    assert count_parameters(experiment(depth=34, norm_affine="prompt")) - plain == (64 + 1) * 2 * channels + 3 * 64
    # Submanifold convolutions of the stages: two a block, less the first of each stage.
    assert count_parameters(experiment(depth=34, adapters=True)) - plain == 3 * (5 * 64**2 + 23 * 128**2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"exclusive_stages": (5,)}, "model.exclusive_stages is (5,); expected stages of 1 to 4, or 0 for the stem, e"),
        ({"exclusive_stages": (4, 4)}, "model.exclusive_stages is (4, 4); expected stages of 1 to 4, or 0 for the ste"),
        (
            {"exclusive_stages": (4,), "selection": SELECTION},
            "model.exclusive_stages is (4,); expected stages that do not select their kernels (model.selection).",
        ),
        (
            {"exclusive_stages": (0,), "selection": replace(SELECTION, convolutions=("stem",))},
            "expected stages that do not select their kernels (model.selection).",
        ),
        (
            EVERYTHING | {"exclusive_stages": (0, 1, 2, 3, 4)},
            "expected a part that datasets share: with exclusive neck and norms, leave the stem 0 out.",
        ),
        (
            {"adapters": True, "selection": SELECTION},
            "model.adapters is True; expected False where the stages select their kernels (model.selection).",
        ),
        (
            {"adapters": True, "exclusive_stages": (1, 2, 3, 4)},
            "model.adapters is True; expected False where no stage is shared (model.exclusive_stages).",
        ),
        ({"norm_affine": "prompt", "prompt_dim": 0}, "model.prompt_dim is 0; expected 1 or more."),
    ],
)
def test_what_makes_no_sense_is_refused(options, sentence):
    with pytest.raises(InputError) as error:
        experiment(**options)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"selection": SELECTION, "norm_affine": "prompt"},
        {"selection": replace(SELECTION, convolutions=("stem",)), "adapters": True, "exclusive_stages": (4,)},
        {"selection": SELECTION, "exclusive_stages": (0,)},
        {"adapters": True, "norm_affine": "prompt", "neck": "exclusive"},
        EVERYTHING,
    ],
)
def test_what_may_be_combined(options):
    assert count_parameters(experiment(**options)) > count_parameters(experiment())
