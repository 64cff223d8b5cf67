"""Compile the detector for an NVIDIA H200 on a machine without one, and estimate how fast it would be.

    python -m benchmarks.gpu_aot [--scan scan.bin] [--batch 1 16] [--dtype bfloat16] [--model sfks] [--pass evaluate]

JAX's compiler for NVIDIA GPUs needs no GPU: given the description of a device it compiles ahead of time, down to the
machine code of its Triton kernels. It is installed into an environment of its own, 6 GB in the user's cache folder
(`--environment`), with the versions of JAX, Flax and Optax that run here. Autotuning is off, for it would run kernels.

Reported of each program, which is evaluation by the folded detector, or a training step with AdamW and a stand-in loss:

- launches: operations that the device starts, loops unrolled;
- temporaries: memory beside arguments and results, as the compiler allocates it;
- traffic and TFLOP: bytes from and to memory and operations of all matmuls, counted from the compiled text
  (`hlo_roofline` has the rules);
- needed: operations of the pairs there are, 2 * pairs * Cin * Cout, three times that in training;
- atomics: scatters whose indices may repeat, which add in no fixed order;
- maps: bytes of sites and maps that go from the host to the device, and the time that takes;
- estimate: the sum of the operations' roofline times. Nothing was run: it is an estimate, never a measurement.

Rows of a batch are copies of one scan. "tf32" is float32 with products in TF32, "float32" has full products.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import report

PASSES = ("evaluate", "step")
MODELS = ("tr3d", "sfks")
DTYPES = ("bfloat16", "tf32", "float32")
_PACKAGES = ("flax", "optax", "numpy", "scipy", "jaxtyping", "ml_collections", "absl-py")
_ROOT = Path(__file__).resolve().parent.parent

DEVICE = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
"""Description of the device, as in OpenXLA's xla/backends/gpu/target_config/specs/h200.txtpb (Apache License 2.0)."""


def default_environment() -> Path:
    """Folder of the environment with JAX's compiler for GPUs, by version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "h2a2_jax" / f"gpu_aot-jax-{importlib.metadata.version('jax')}"


def prepare_environment(folder: Path) -> Path:
    """Python of the environment, which is made first where there is none.

    Raises:
        subprocess.CalledProcessError: pip cannot install JAX; its message is on standard error.
    """
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        report(f"installing JAX's compiler for GPUs into {folder}: 6 GB, once")
        venv.create(folder, with_pip=True, clear=True)
        versions = [f"{name}=={importlib.metadata.version(name)}" for name in _PACKAGES]
        jax = f"jax[cuda12]=={importlib.metadata.version('jax')}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", jax, *versions], check=True, stdout=sys.stderr)
        done.touch()
    return python


def run(python: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile and estimate every program, each in a process of the environment; one result for each.

    Raises:
        subprocess.CalledProcessError: a program cannot be compiled; the message is on standard error.
    """
    environment = {
        **os.environ,
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
        "PYTHONPATH": str(_ROOT),
    }
    results = []
    for case in (
        [kind, model, str(batch), dtype]
        for model in options.model
        for kind in options.passes
        for batch in options.batch
        for dtype in options.dtype
    ):
        report(f"compiling {' '.join(case)}")
        command = [python, "-m", "benchmarks.gpu_aot", "--case", *case, "--algorithm", options.algorithm]
        command += ["--width", options.width]
        command += ["--scan", options.scan.resolve()] if options.scan else []
        command += ["--keep", options.keep.resolve()] if options.keep else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        results.append(json.loads(done.stdout))
    return results


def compile_case(
    kind: str, model: str, batch: int, dtype: str, *, algorithm: Any, width: str, scan: Path | None, keep: Path | None
) -> dict[str, Any]:
    """Compile one program for the device and estimate it; in the environment."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from benchmarks import hlo_roofline
    from benchmarks.gpu_programs import Case

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="NVIDIA H200", target_config=DEVICE, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    case = Case.of(scan, batch, model, width, algorithm)

    def abstract(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

    function, make = case.program(kind, dtype, algorithm)
    arguments = (*jax.eval_shape(make), case.plan)
    jitted = jax.jit(function, donate_argnums=(0,) if kind == "step" else ())
    start = time.perf_counter()
    lowered = jitted.lower(*jax.tree.map(abstract, arguments))
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    text, memory = program.as_text() or "", program.memory_analysis()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{kind}_{model}_{batch}_{dtype}_{algorithm}.txt").write_text(text)
    pairs = {}
    for layer in case.layers:
        kmap = layer.kernel_map
        pairs[kmap.kernel_volume, kmap.out_capacity, kmap.in_capacity] = float(layer.pairs)
        pairs[kmap.kernel_volume, kmap.in_capacity, kmap.out_capacity] = float(layer.pairs)
    maps = hlo_roofline.Maps(pairs, "f32" if dtype == "float32" else "tf32")
    cost = hlo_roofline.estimate(hlo_roofline.parse(text), maps)
    needed = case.flops * (3 if kind == "step" else 1)
    map_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(case.plan))
    return {
        "pass": kind,
        "model": model,
        "batch": batch,
        "dtype": dtype,
        "algorithm": algorithm,
        "scan": case.scan,
        "width": width,
        "jax": jax.__version__,
        "launches": cost.launches,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9 if memory is not None else None,
        "traffic_gb": cost.traffic / 1e9,
        "tflop": cost.flop / 1e12,
        "needed_tflop": needed / 1e12,
        "atomics": cost.atomics,
        "maps_mb": map_bytes / 1e6,
        "maps_ms": map_bytes / hlo_roofline.H200.transfer * 1e3,
        "estimate_ms": cost.seconds * 1e3,
        "estimate_scans_per_second": batch / cost.seconds,
        "trace_s": traced - start,
        "compile_s": compiled - traced,
        "by_kind": {kind: dict(parts) for kind, parts in cost.by_kind.items()},
        "slowest": [[seconds * 1e3, times, text] for seconds, times, text in cost.slowest],
    }


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """Format results as a table."""
    lines = [
        "Estimates for an NVIDIA H200 from compiled programs; nothing was run.",
        "",
        f"{'':36}{'launches':>9}{'temp GB':>9}{'traffic GB':>12}{'TFLOP':>8}{'needed':>8}{'atomics':>9}{'maps MB':>9}"
        f"{'maps ms':>9}{'est. ms':>9}{'scans/s':>9}",
    ]
    for r in results:
        name = f"{r['pass']} {r['model']} x{r['batch']} {r['dtype']} {r['algorithm']}"
        lines.append(
            f"{name:36}{r['launches']:9,}{r['temporaries_gb'] or float('nan'):9.2f}{r['traffic_gb']:12.1f}"
            f"{r['tflop']:8.2f}{r['needed_tflop']:8.2f}{r['atomics']:9}{r['maps_mb']:9.1f}{r['maps_ms']:9.2f}"
            f"{r['estimate_ms']:9.2f}{r['estimate_scans_per_second']:9.0f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=PASSES, help="default both")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help="default both")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 16), help="copies of the scan (default 1 and 16)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=("bfloat16",), help="default bfloat16")
    parser.add_argument("--algorithm", default="auto", help="algorithm of the convolutions (default auto)")
    parser.add_argument("--width", choices=("full", "small"), default="full", help="default full, TR3D's own")
    parser.add_argument("--environment", type=Path, help="folder of the environment; default in the user's cache")
    parser.add_argument("--keep", type=Path, help="folder to keep the compiled texts in")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--case", nargs=4, metavar=("PASS", "MODEL", "BATCH", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if any(batch < 1 for batch in options.batch):
        parser.error(f"--batch is {options.batch}, expected numbers from 1 on")
    if options.case:
        kind, model, batch, dtype = options.case
        result = compile_case(
            kind, model, int(batch), dtype, algorithm=options.algorithm, width=options.width, scan=options.scan,
            keep=options.keep,
        )  # fmt: skip
        print(json.dumps(result))
        return 0
    try:
        python = prepare_environment(options.environment or default_environment())
        results = run(python, options)
    except subprocess.CalledProcessError as error:
        report(f"{' '.join(map(str, error.cmd))} failed; its message is above.")
        return 2
    print(json.dumps(results, indent=1) if options.json else table_of(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
