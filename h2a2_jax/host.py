"""The machine that a process runs on, and times as people read them."""

import os


def core_numbers() -> list[int]:
    """Numbers of the CPU cores that this process may use, which on a shared machine are not all there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many CPU cores this process may use."""
    return len(core_numbers())


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
