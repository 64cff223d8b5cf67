"""The benchmark of compile time counts every operation once, by origin."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compile_time
from h2a2_jax import sparse


def test_operations_are_counted_by_origin():
    sites = sparse.pad_sites(sparse.site_set(np.zeros((1, 4), np.int32)), 4)

    def loss(x, sites):
        rows = sparse.submanifold_map(sites, 3).neighbors[0]
        return (jnp.sin(x) * rows).sum()

    lowered = jax.jit(jax.grad(loss)).lower(np.ones(4, np.float32), sites)
    text = lowered.as_text(debug_info=True)
    for counts in (
        compile_time.count_stablehlo(text),
        compile_time.count_optimised(lowered.compile().as_text()),
    ):
        assert counts["all"] == sum(counts[name] for name in compile_time.ORIGINS)
        assert counts["maps"] > 20 and counts["backward"] > 0 and counts["optimizer"] == 0
    operations = re.findall(r"^ +%\S+ = ", lowered.as_text(), re.MULTILINE)
    assert compile_time.count_stablehlo(text)["all"] == len(operations)


def test_a_number_of_repeats_below_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        compile_time.main(["--repeats", "0"])
    assert "--repeats is 0" in capsys.readouterr().err
