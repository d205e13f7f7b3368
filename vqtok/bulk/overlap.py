"""Threads that work ahead of whoever waits for the results, in an order that never changes."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

_AHEAD = 2  # elements that wait for who takes them
_END = object()


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], waiting: int) -> Iterator[Any]:
    """`map` on threads that reads no more than `waiting` items ahead."""
    futures: deque[Future[Any]] = deque()
    for item in items:
        futures.append(pool.submit(work, item))
        while futures and (len(futures) >= waiting or futures[0].done()):
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


class ahead:  # noqa: N801 (a context manager, used like a function)
    """Iterate on a thread, a few elements ahead of who takes them; errors arrive where they would have.

    Example:
        >>> with ahead(iter([1, 2, 3])) as numbers:
        ...     print(list(numbers))
        [1, 2, 3]
    """

    def __init__(self, iterator: Iterator[Any], depth: int = _AHEAD):
        self._iterator, self._queue = iterator, queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> Iterator[Any]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *error: Any) -> None:
        self._stopped.set()
        while self._thread.is_alive():  # it may wait for a free place
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                self._thread.join(0.01)

    def _fill(self) -> None:
        last: Any = _END
        try:
            for element in self._iterator:
                if self._stopped.is_set():
                    break
                self._queue.put(element)
        except BaseException as error:
            last = error
        finally:
            getattr(self._iterator, "close", lambda: None)()  # the pool of threads of a generator ends here
        self._queue.put(last)

    def _taken(self) -> Iterator[Any]:
        while (element := self._queue.get()) is not _END:
            if isinstance(element, BaseException):
                raise element
            yield element


class Results:
    """A thread that makes results of what was computed, a few at a time, and says so in the order in which they were asked for.

    Args:
        report: is told numbers.
        done: is told everything else.

    What fails there is raised by the next call, or at the end, and nothing that was asked for later is done. If something else ends it,
    what was asked for is done and said first.
    """

    def __init__(self, report: Callable[[int], Any], done: Callable[[Any], Any]):
        self._say = {"count": report, "record": done}
        self._pool, self._waiting = ThreadPoolExecutor(1), deque[tuple[str, Future[Any]]]()
        self._failed = False

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._pool.shutdown()
        try:
            self._settle(0)
        except Exception:
            if error is None:
                raise

    def count(self, work: Callable[..., int], *arguments: Any) -> None:
        """Do work whose result goes to `report`."""
        self._ask("count", work, arguments)

    def record(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Do work whose result goes to `done`."""
        self._ask("record", work, arguments)

    def _ask(self, kind: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._waiting.append((kind, self._pool.submit(self._do, work, arguments)))
        self._settle(_AHEAD)

    def _do(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._failed:
            raise CancelledError
        try:
            return work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _settle(self, most: int) -> None:
        """Say what is there, and wait until no more than `most` are missing."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0][1].done()):
            kind, future = self._waiting.popleft()
            self._say[kind](future.result())
