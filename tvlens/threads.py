"""How many threads torch and numpy use for a stretch of small matrix work.

Factorising a matrix under about 2,048 rows on several threads is no faster than on one, and on a
busy machine was seen 200 times slower: the threads wait for each other at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager


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
