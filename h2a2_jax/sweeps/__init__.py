"""Sweeps: many runs of one config that differ in one thing each, and a table of them.

`sweep_plan` lists the runs and finds their folders, `sweep_runner` trains them in worker processes, `sweep_results`
makes the table. `protocol` and `transfer` define their own runs and columns. A stopped or killed sweep resumes when the
same command is started again.
"""
