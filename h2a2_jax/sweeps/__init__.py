"""Sweeps: many runs of one config that differ in one thing each, a table at the end.

`plan` says which runs a sweep is made of, `runner` trains them in processes of their own (`worker`), `results` makes
the table, `picture` draws it. A sweep that was stopped, however it was, goes on when it is started again.
"""
