import jax
import jax.numpy as jnp
import numpy as np

from h2a2_jax.sparse import xla_cpu


def test_options_of_other_versions_are_left_out(monkeypatch):
    assert not xla_cpu.knows_option("xla_cpu_no_such_option")
    monkeypatch.setattr(xla_cpu, "WITHOUT_YNNPACK", {"xla_cpu_no_such_option": ""})
    assert xla_cpu.compiler_options() is None


def test_accelerators_get_no_options_of_the_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla_cpu.compiler_options() is None


def test_programs_with_the_options_compute_the_same():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(512, 64)), jnp.float32)
    product = jax.jit(lambda a: a @ a.T, compiler_options=xla_cpu.compiler_options())
    np.testing.assert_allclose(product(a), np.asarray(a, np.float64) @ np.asarray(a, np.float64).T, atol=1e-4)
