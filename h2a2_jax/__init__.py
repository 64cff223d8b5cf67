"""H2A2 in JAX: one indoor 3D object detector trained jointly on several datasets of point clouds.

The subpackages stand on each other in this order, and each is usable without those after it:
`sparse` (sparse tensors and convolutions), `layers`, `models`, `training`; `boxes` stands on its own.
"""

__version__ = "0.0.1"
