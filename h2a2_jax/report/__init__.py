"""Report of a run as one page: kernel selection and gradient balance.

`write.write_report` writes it; `observation` runs the detector on validation scans, `offsets` holds the measures on
arrays, `figures_selection` and `figures_training` draw.
"""
