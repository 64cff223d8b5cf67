import numpy as np
import pytest

from h2a2_jax.scans.specs import SPECS
from h2a2_jax.scans.synthetic.furniture import PLAIN_BUILDERS, make_solids
from h2a2_jax.scans.synthetic.rooms import KINDS, label_of, programme

FORMS = [(name, kind.build) for name, kind in KINDS.items()] + list(PLAIN_BUILDERS.items())


@pytest.mark.parametrize(("name", "build"), FORMS)
def test_primitives_fill_exactly_the_size(name, build):
    rng = np.random.default_rng(0)
    for _ in range(10):
        size = (np.array(KINDS[name].size) * np.exp(rng.normal(0, 0.2, 3))).tolist()
        parts = make_solids(build(tuple(size), rng))
        reach = parts.boxes[:, 3:6] / 2
        low, high = (parts.centers - reach).min(axis=0), (parts.centers + reach).max(axis=0)
        np.testing.assert_allclose(low, [-size[0] / 2, -size[1] / 2, 0], atol=2e-3)
        np.testing.assert_allclose(high, [size[0] / 2, size[1] / 2, size[2]], atol=2e-3)
        assert (parts.halves > 0).all()
        assert parts.colors.min() >= 0 and parts.colors.max() <= 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_class_of_a_dataset_has_furniture_and_a_room(spec):
    made = {label_of(name, spec) for name in KINDS}
    placed = {label_of(name, spec) for room in programme(spec, "full").rooms for name in room}
    assert made - {-1} == placed - {-1} == set(range(spec.num_classes))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("scale", ["demo", "full"])
def test_rooms_name_furniture_that_exists(spec, scale):
    assert {name for room in programme(spec, scale).rooms for name in room} <= set(KINDS)
