"""Array types shared by the whole package."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array on the host or on a device."""
