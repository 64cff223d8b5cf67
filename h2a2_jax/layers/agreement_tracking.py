"""Agreement of the datasets' gradients in a training loop: measured of each batch, and what follows from it.

The gradients of the shared kernels go into moving averages (`Agreement`), these give F of each offset, which is one of
the layers' statistics. Where offsets are shared, their exclusive kernels follow the shared one, from which they will
part.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.packing import name_tensors, unpack, with_tensors
from h2a2_jax.layers.agreement import Agreement, disagreement, observe, prior_logit
from h2a2_jax.layers.kernel_selection import SelectionConfig, SelectiveConv


@dataclass(frozen=True)
class Layer:
    """A convolution that measures agreement.

    Attributes:
        path: its path in the model, as in "backbone.stages.0.0.first.conv".
        name: its name in the metrics, as in "layer1_0.conv1".
    """

    path: str
    name: str


@dataclass(frozen=True)
class AgreementLayers:
    """The convolutions of a model that measure agreement, by the shape of their kernels, as in "27x16x32".

    All are of one configuration. The train step of `h2a2_jax.training` calls `measure` after the gradients and
    `follow_shared` after the update; `docs/api/layers.md` has them in a loop of its own.

    Attributes:
        layers: convolutions of each shape.
        kernels: shape of the kernel by the same names.
        selection: their configuration.
        num_datasets: number D of datasets.
    """

    layers: Mapping[str, tuple[Layer, ...]]
    kernels: Mapping[str, tuple[int, ...]]
    selection: SelectionConfig
    num_datasets: int

    @classmethod
    def of(cls, model: nnx.Module) -> "AgreementLayers | None":
        """Find those of a model, whose arrays may be shapes; None if nothing in it measures agreement."""
        layers: dict[str, list[Layer]] = {}
        kernels: dict[str, tuple[int, ...]] = {}
        found = [(path, part) for path, part in nnx.iter_modules(model) if isinstance(part, SelectiveConv)]
        found = [(path, part) for path, part in found if part.disagreement is not None]
        if not found or found[0][1].exclusive.shape[0] < 2:
            return None
        for path, part in found:
            shape = tuple(part.shared.shape)
            key = "x".join(map(str, shape))
            layers.setdefault(key, []).append(Layer(".".join(map(str, path)), part.name))
            kernels[key] = shape
        first = found[0][1]
        return cls({k: tuple(v) for k, v in layers.items()}, kernels, first.selection, first.exclusive.shape[0])

    def empty(self) -> dict[str, Agreement]:
        """Averages of no batch, with an axis of all datasets in front."""
        return {
            key: Agreement.empty(self.num_datasets, len(layers), self.kernels[key])
            for key, layers in self.layers.items()
        }

    def measure(
        self,
        agreement: Mapping[str, Agreement],
        stats: Any,
        gradients: Any,
        gamma: Mapping[str, Float[Array, "local v"]],
        counts: Bool[Array, " local"],
        batch: Float[Array, " local"],
        scans: Float[Array, " local"],
        axis_name: str | None = None,
    ) -> tuple[dict[str, Agreement], Any]:
        """Averages and statistics after a batch.

        Args:
            agreement: averages so far, with a leading axis of the datasets of this device.
            stats: running statistics of the model, plain or packed; F of each layer is in them.
            gradients: gradients of the shared parameters of each dataset, plain or packed.
            gamma: share of scans that took the shared kernel, by the names of layers.
            counts: datasets that took part in the batch, if it is good; else none.
            batch: scans of each dataset in a batch.
            scans: training scans of each dataset; infinity where none is seen twice.
            axis_name: mesh axis of the datasets; None where all are on this device.
        """
        decay = self.selection.agreement_decay
        found = tensors_of(gradients)
        averages, measured = {}, {}
        for key, layers in self.layers.items():
            kernels = jnp.stack([found[_of(layer, "shared")] for layer in layers], axis=1)
            took_shared = jnp.stack([gamma[layer.name] >= 1 for layer in layers], axis=1)
            averages[key] = observe(agreement[key], kernels, took_shared & counts[:, None, None], decay)
            f, _ = disagreement(averages[key], batch, scans, decay, axis_name)
            for i, layer in enumerate(layers):
                measured[_of(layer, "disagreement")] = f[i]
        local = len(counts)
        rows = {name: jnp.broadcast_to(f, (local, *f.shape)) for name, f in measured.items()}
        return averages, with_tensors(stats, rows)

    def follow_shared(self, shared: Any, exclusive: Any, stats: Any, frozen: Collection[str] = ()) -> Any:
        """Exclusive parameters in which each offset that prefers the shared kernel has a copy of it.

        An offset prefers the shared kernel where alpha is one half or more. Its datasets will part from there.

        Args:
            shared: shared parameters, plain or packed.
            exclusive: exclusive parameters of the datasets of this device, plain or packed.
            stats: running statistics.
            frozen: paths of parameters that stay as they are.
        """
        ours, theirs, measured = tensors_of(shared), tensors_of(exclusive), tensors_of(stats)
        s, tied = self.selection, {}
        for layer in (layer for layers in self.layers.values() for layer in layers):
            if _of(layer, "exclusive") in frozen:
                continue
            prior = (theirs if s.structure_parameters == "exclusive" else ours)[_of(layer, "prior")]
            f = measured[_of(layer, "disagreement")]
            logit = prior_logit(prior, f, s.agreement_threshold, s.agreement_sharpness)
            kernel, own = ours[_of(layer, "shared")], theirs[_of(layer, "exclusive")]
            tied[_of(layer, "exclusive")] = jnp.where((logit >= 0)[..., None, None], kernel.astype(own.dtype), own)
        return with_tensors(exclusive, tied)


def tensors_of(tree: Any) -> dict[str, Array]:
    """Tensors of a plain or packed tree by their paths."""
    return dict(zip(name_tensors(tree), jax.tree.leaves(unpack(tree)), strict=True))


def _of(layer: Layer, part: str) -> str:
    return f"{layer.path}.{part}" if layer.path else part
