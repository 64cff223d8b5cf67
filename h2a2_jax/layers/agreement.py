"""Agreement of the datasets' gradients at each kernel offset: the long-term statistics of kernel selection's prior.

While an offset takes the shared kernel, each dataset's gradient for that kernel tells where the dataset would move it.
If all want the same kernel, these gradients differ no more than those of a dataset's own scans let them differ by
chance:

    F_j = spread of the datasets' mean gradients / spread that their scans explain

F is 1 + h/v, where h is the variance between the kernels that the datasets want and v that of a kernel estimated from
one dataset alone. A kernel of its own costs a dataset v, a shared one h: from F = 2 on, exclusive kernels are better.

    alpha_j = sigmoid(O_j + sharpness * log(threshold / F_j)),   threshold = 2

An offset with exclusive kernels has gradients near zero, which say nothing. So training does not take the likelier
kernel in each step: the shared one is taken in a share alpha of the steps (`explored_threshold`), and F goes on being
measured in these: an offset finds its way back.
"""

import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.layers.context import AxisName

FEWEST = 50
"""Batches that an average needs before it says anything."""
_SMALLEST = 1e-30


class Agreement(NamedTuple):
    """Moving averages of the datasets' gradients, for a stack of L convolutions with kernels of one shape; float32.

    Attributes:
        mean: [D, L, V, Cin, Cout], of the gradient of each offset's kernel.
        square: [D, L, V], of the gradient's squared norm.
        weight: [D, L, V], 1 - decay^n after n batches; the averages divided by it are unbiased.
    """

    mean: Float[Array, "d l v c_in c_out"]
    square: Float[Array, "d l v"]
    weight: Float[Array, "d l v"]

    @classmethod
    def empty(cls, num_datasets: int, layers: int, kernel: tuple[int, ...]) -> "Agreement":
        """Averages of no batch, for kernels of the shape [V, Cin, Cout]."""
        shape = (num_datasets, layers, kernel[0])
        return cls(jnp.zeros((*shape, *kernel[1:])), jnp.zeros(shape), jnp.zeros(shape))


def observe(
    agreement: Agreement, gradients: Float[Array, "d l v c_in c_out"], seen: Bool[Array, "d l v"], decay: float
) -> Agreement:
    """Move the averages towards the gradients of a batch.

    Args:
        agreement: averages so far.
        gradients: gradient of each dataset's loss for the shared kernel.
        seen: offsets where all scans of the dataset's batch took the shared kernel; the others say nothing.
        decay: weight of the past in the averages.
    """
    rate = jnp.where(seen, 1 - decay, 0).astype(agreement.mean.dtype)
    gradients = jnp.where(seen[..., None, None], gradients, 0).astype(agreement.mean.dtype)
    return Agreement(
        agreement.mean + rate[..., None, None] * (gradients - agreement.mean),
        agreement.square + rate * ((gradients**2).sum((-2, -1)) - agreement.square),
        agreement.weight + rate * (1 - agreement.weight),
    )


def disagreement(
    agreement: Agreement,
    batch: Float[Array, " d"],
    scans: Float[Array, " d"],
    decay: float,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "l v"], Bool[Array, "l v"]]:
    """F of each offset: how far the datasets' gradients differ, in units of what their scans let differ by chance.

    With b scans in a batch and n scans in the dataset, the gradients of its batches have the variance
    S^2 / b * (1 - b/n), where S^2 is that of a single scan's; the mean over the dataset has S^2 / n, or S^2 over the
    scans within reach of the moving average if these are fewer.

    Args:
        agreement: averages.
        batch: scans in a batch of each dataset. A dataset all of whose scans are in each batch shows no variance, so
            that F is 0 there.
        scans: training scans of each dataset.
        decay: decay of the averages.
        axis_name: mesh axis over which the datasets are spread; None where all are on this device.

    Returns:
        F, and True where two datasets or more have seen `FEWEST` batches; F is 1 elsewhere. The same on all
        devices.
    """

    def total(values: Array) -> Array:
        values = values.sum(0)
        return values if axis_name is None else lax.psum(values, axis_name)

    batch, scans = (jnp.asarray(values, agreement.mean.dtype)[:, None, None] for values in (batch, scans))
    known = agreement.weight >= 1 - decay**FEWEST
    weight = jnp.maximum(agreement.weight, _SMALLEST)
    mean = agreement.mean / weight[..., None, None]
    effective = (1 + decay) / (1 - decay) * weight / (2 - weight)
    variance = jnp.maximum(agreement.square / weight - (mean**2).sum((-2, -1)), 0) / (1 - 1 / jnp.maximum(effective, 2))
    of_scan = variance * batch / jnp.maximum(1 - batch / scans, 0)
    chance = of_scan / jnp.minimum(scans, batch * effective)
    # A full batch has no variance over an infinite factor: it explains any spread.
    chance = jnp.where(batch < scans, chance, jnp.inf)
    count = total(known.astype(mean.dtype))
    several, divisor = count >= 2, jnp.maximum(count, 2)
    centre = total(jnp.where(known[..., None, None], mean, 0)) / divisor[..., None, None]
    between = total(jnp.where(known, ((mean - centre) ** 2).sum((-2, -1)), 0)) / (divisor - 1)
    within = total(jnp.where(known, chance, 0)) / divisor
    f = jnp.where(within > _SMALLEST, between / jnp.maximum(within, _SMALLEST), 1.0)
    return jnp.where(several, f, 1.0), several


def prior_logit(
    prior: Float[Array, "..."], f: Float[Array, "..."], threshold: float, sharpness: float
) -> Float[Array, "..."]:
    """Logit of alpha: O + sharpness * log(threshold / F).

    Args:
        prior: O, [V] or with axes in front.
        f: disagreement F, of a shape that broadcasts with O; taken as at least 1e-6 and at most 1e6.
        threshold: F that adds nothing to O.
        sharpness: weight of the logarithm.
    """
    return prior + sharpness * jnp.log(threshold / jnp.clip(f, 1e-6, 1e6))


def explored_threshold(tau: float, step: Int[Array, ""], offsets: int, name: str, least: float) -> Float[Array, " v"]:
    """Threshold of alpha * beta in a training step, so that a score s passes in a share s / (2 tau) of the steps.

    At tau, where the choice of prediction turns, half of the steps take the shared kernel. The thresholds of an offset
    run evenly over (0, 2 tau), by a golden-ratio sequence of the step: all devices and a resumed run draw alike.

    Args:
        tau: threshold in prediction.
        step: number of the training step.
        offsets: number V of offsets.
        name: name of the layer; layers differ in their sequences.
        least: share of steps in which an offset takes the shared kernel in any case, with a threshold below 0.
    """
    golden, plastic = np.uint32(2654435769), np.uint32(3242174889)  # 2^32 / 1.618..., 2^32 / 1.324...
    shift = np.arange(offsets, dtype=np.uint32) * plastic + np.uint32(zlib.crc32(name.encode()))
    place = (jnp.asarray(step).astype(jnp.uint32) + 1) * golden + shift
    share = (place >> 8).astype(jnp.float32) / (1 << 24)
    return jnp.where(share < least, -1.0, 2 * tau * share)
