"""Report of a run as one page: kernel selection and gradient balance.

`write_report` writes it; `observation` runs the detector on validation scans, `offsets` holds the measures on arrays,
`figures_selection` and `figures_training` draw.
"""

from h2a2_jax.report.write import write_report

__all__ = ["write_report"]
