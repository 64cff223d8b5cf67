"""Sweeps: many runs of one config that differ in one thing each, and a table of them.

`ablation` (with the tau sweep), `protocol` and `transfer` name the runs and the columns of their tables. `sweep_plan`
describes a run and finds its folder, `sweep_runner` trains in worker processes, `sweep_results` makes the results and
the picture, `tables` sets them as Markdown, CSV and LaTeX. A stopped or killed sweep resumes when the same command is
started again.
"""
