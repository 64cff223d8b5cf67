"""What a run did, as one page to look at: kernel selection, gradient balance, and the premise behind both.

`write_report` gathers; `offsets`, `geometry` and `energy` are the measures on arrays, `probe` runs detectors, the
`figures` draw, `page` puts it into HTML.
"""

from h2a2_jax.report.write import write_report

__all__ = ["write_report"]
