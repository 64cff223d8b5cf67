"""Values prepared ahead by Grain, in a thread or in processes, in the order of their numbers.

The values and their order do not depend on the number of workers.
"""

import gc
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np
from absl import flags

from h2a2_jax.errors import InputError
from h2a2_jax.host import end_with_parent, keep_output

T = TypeVar("T")

_ALIGNMENT = 64  # bytes: arrays begin where vector instructions like them to


class WorkerDiedError(InputError):
    """A worker process died: it was killed, or memory ran out."""


def prepared_ahead(prepare: Callable[[int], T], first: int, last: int, *, workers: int, ahead: int) -> Generator[T]:
    """Yield prepare(first), ..., prepare(last - 1), computed before they are needed.

    Args:
        prepare: a function of the number alone; with workers, the function and its results are pickled.
        first: number of the first value.
        last: number after that of the last value.
        workers: number of processes; 0 for a thread of this one. A script with workers needs the usual
            `if __name__ == "__main__":`, for they begin by importing the script.
        ahead: values that a thread holds ready; a worker holds one.

    Raises:
        Exception: an error of `prepare`, in the turn of its value.
        WorkerDiedError: a worker died.
    """
    if first >= last:
        return
    numbers = grain.MapDataset.range(first, last)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, ahead))
    if workers == 0:
        values = iter(numbers.map(_Caught(prepare)).to_iter_dataset(reading))
    else:
        if not flags.FLAGS.is_parsed():  # Grain asks them for its debug options
            flags.FLAGS.mark_as_parsed()
        # A worker prepares one value at a time, and the next one while that waits to be fetched.
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        options = grain.multiprocessing.MultiprocessingOptions(min(workers, last - first), per_worker_buffer_size=1)
        dataset = numbers.map(_Packed(prepare)).to_iter_dataset(reading)
        values = iter(dataset.mp_prefetch(options, worker_init_fn=_begin_worker))
    try:
        for value in values if workers == 0 else _while_workers_live(values):
            result = value if workers == 0 else unpack(value)
            if isinstance(result, _Failure):
                raise result.error
            yield result
    finally:
        values.close()
        value = result = None
        gc.collect()  # shared memory that reference cycles still hold would be reported as leaked


def _while_workers_live(values: Iterator[T]) -> Iterator[T]:
    """Yield the values. Errors of `prepare` are values too, so that an error here is the death of a worker."""
    try:
        yield from values
    except Exception as error:
        raise WorkerDiedError(
            f"a worker process that loads scans died ({error}); if memory ran out, train with fewer "
            "(--config.train.workers=2, or 0 for a thread); a script of one's own that uses workers must start its "
            'work below `if __name__ == "__main__":`.'
        ) from error


@dataclass(frozen=True)
class _Failure:
    """An error to be raised in the turn of its value: Grain would wrap a raised error in a text of its own."""

    error: Exception


@dataclass(frozen=True)
class _Caught(Generic[T]):
    prepare: Callable[[int], T]

    def __call__(self, number: int) -> T | _Failure:
        try:
            return self.prepare(int(number))
        except Exception as error:  # raised again in the caller's thread
            return _Failure(error)


@dataclass(frozen=True)
class _Packed(Generic[T]):
    prepare: Callable[[int], T]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        result = _Caught(self.prepare)(number)
        return pack(_Failure(_portable(result.error)) if isinstance(result, _Failure) else result)


def _portable(error: Exception) -> Exception:
    """Make an error fit for another process, which gets its traceback as a note."""
    lines = "".join(traceback.format_exception(error))
    error.add_note(f"In a worker process: {lines}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error that is constructed from more than its text
        return RuntimeError(lines)
    return error


def pack(value: Any) -> dict[str, np.ndarray]:
    """Pack a value into two arrays of bytes: Grain passes large arrays between processes in shared memory.

    Args:
        value: anything that pickles; its numpy arrays make up the second array, each of them once.
    """
    buffers: list[pickle.PickleBuffer] = []
    plain = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    starts, size = [], 0
    for view in views:
        starts.append((size, view.nbytes))
        size += -(-view.nbytes // _ALIGNMENT) * _ALIGNMENT
    body = np.empty(size, np.uint8)
    for (start, length), view in zip(starts, views, strict=True):
        body[start : start + length] = np.frombuffer(view, np.uint8)
    return {"head": np.frombuffer(pickle.dumps((plain, starts)), np.uint8), "body": body}


def unpack(packed: dict[str, np.ndarray]) -> Any:
    """Unpack a value of `pack`; its arrays are views of `packed`."""
    plain, starts = pickle.loads(packed["head"].tobytes())
    body = packed["body"].data
    return pickle.loads(plain, buffers=[body[start : start + length] for start, length in starts])


def _begin_worker(index: int, count: int) -> None:
    """Keep a worker from accelerators, and end it with the process that needs its values."""
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its workers
    end_with_parent()
    keep_output()
