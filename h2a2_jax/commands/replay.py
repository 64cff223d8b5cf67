"""`--mode=replay`."""

from pathlib import Path

from h2a2_jax.checkpoint.store import checkpoint_place
from h2a2_jax.errors import InputError
from h2a2_jax.training.nonfinite import replay


def replay_command(workdir: Path, step: str | None = None) -> int:
    """Run a batch again that a run kept because it was not finite, and say where that begins.

    Args:
        workdir: folder of the run.
        step: number of the batch; None: the last one kept.

    Returns:
        Exit status: 1 where something is not finite again, 0 where all is.

    Raises:
        InputError: there is no such batch, or no checkpoint.
    """
    if step is not None and not step.isdecimal():
        raise InputError(f"--step is {step!r}; expected the number of a batch that the run kept.")
    number, saved, shards = replay(checkpoint_place(workdir).run, None if step is None else int(step))
    print(f"Batch {number} of {workdir}, with the parameters of step {saved}:")
    for shard in shards:
        print(f"  {shard.text()}")
    return int(not all(shard.is_finite for shard in shards))
