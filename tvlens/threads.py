"""How many threads torch and numpy use for a stretch of small matrix work.

Factorising a matrix under about 2,048 rows on several threads is no faster than on one, and on a
busy machine was seen 200 times slower: the threads wait for each other at every step. Several such
pieces of work, each on one thread, do not wait for each other.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

AT_ONCE = 4
"""Pieces of work at the same time: attention and the three matrices of an MLP are one block."""

Item = TypeVar("Item")
Found = TypeVar("Found")


@runtime_checkable
class Map(Protocol):
    """What ``map`` does: the results of one function of every item, in order."""

    def __call__(
        self, function: Callable[[Item], Found], items: Iterable[Item], /
    ) -> Iterator[Found]:
        """One result an item."""
        ...


@contextmanager
def one_thread(only_if: bool = True) -> Iterator[None]:
    """Run what is inside, or the decorated function, on one thread; then as before.

    Args:
        only_if: False leaves the number of threads alone.
    """
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    try:
        if only_if:
            torch.set_num_threads(1)
        with threadpool_limits(1 if only_if else None, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def at_once() -> int:
    """How many pieces of work ``side_by_side`` takes at a time: each needs its own memory."""
    import torch

    return min(AT_ONCE, torch.get_num_threads())


@contextmanager
def side_by_side() -> Iterator[Map]:
    """A ``map`` that works on as many items as torch has threads, each item on one thread.

    Where torch has one thread it is ``map`` itself. What has not begun when the block is left by
    an exception never does.
    """
    count = at_once()
    with one_thread():
        if count < 2:
            yield map
            return
        with ThreadPoolExecutor(count, "tvlens") as pool:
            try:
                yield pool.map
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
