"""Work beside the network: results of functions that are read ahead, and calls that are made behind, in threads.

The threads are daemons, which unlike those of an executor do not keep the program from ending.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import Queue
from threading import Thread
from typing import TypeVar

Item = TypeVar("Item")

_PATIENCE = 20.0  # s


def read_ahead(functions: Iterable[Callable[[], Item]]) -> Iterator[Future[Item]]:
    """Yield the results of functions in order; each begins while the result before is worked on, no earlier.

    Leaving the loop before its end waits a while for the function that has begun: a program that ends inside of
    compiled code ends with SIGABRT.
    """
    futures = map(_started, functions)
    following = next(futures, None)
    try:
        while following is not None:
            current = following
            wait([current])
            following = next(futures, None)
            yield current
    finally:
        if following is not None:
            wait([following], _PATIENCE)


def _started(function: Callable[[], Item]) -> Future[Item]:
    future: Future[Item] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # else nobody would ever see the end of the future
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


class WorkBehind:
    """Calls that a thread makes one after the other, in order, while the caller goes on; at most `waiting` wait.

    Leaving the block waits for all of them, also after an exception. The first exception of a call is raised at the
    next `put`, or on leaving the block without another one; later calls are not made.
    """

    def __init__(self, waiting: int = 1):
        self._calls: Queue[Callable[[], None] | None] = Queue(waiting)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, daemon=True)

    def put(self, call: Callable[[], None]) -> None:
        """Have a call made; waits while too many do."""
        if self._error is not None:
            raise self._error
        self._calls.put(call)

    def __enter__(self) -> "WorkBehind":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._calls.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    call()
                except BaseException as error:  # raised where the caller is
                    self._error = error
