"""Flags of XLA for tests: devices, and compiling in little time, which is most of the time of the tests."""

from importlib.metadata import version

QUICK = ["--xla_backend_optimization_level=0"]
"""Little is optimised."""
EMITTERS_IN_USE: dict[str, bool | str] = {}
"""Compiler options for a test that asks for equal bits of two programs: the emitters that users have."""
if version("jaxlib").startswith("0.10."):  # XLA refuses a flag that it does not know
    # The older emitters of fusions: a third less time for a training step.
    QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_prefer_vector_width=128"]
    EMITTERS_IN_USE["xla_cpu_use_fusion_emitters"] = True


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many CPU devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *QUICK])
