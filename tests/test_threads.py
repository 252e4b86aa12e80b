"""One thread for small work, and as before afterwards."""

import threading
import time

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from tvlens.threads import one_thread, side_by_side


def _of_numpy() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_one_inside_and_as_before_after_an_exception() -> None:
    def failing() -> None:
        with one_thread():
            seen.append({torch.get_num_threads(), *_of_numpy()})
            raise RuntimeError("inside")

    seen: list[set[int]] = []
    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert seen == [{1}]
    assert {torch.get_num_threads(), *_of_numpy()} == {2}


@pytest.mark.usefixtures("two_threads")
def test_a_decorated_function_runs_on_one_thread_every_time() -> None:
    @one_thread()
    def threads() -> int:
        return torch.get_num_threads()

    assert [threads(), threads()] == [1, 1]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_large_work_keeps_its_threads() -> None:
    with one_thread(only_if=False):
        assert {torch.get_num_threads(), *_of_numpy()} == {2}


@pytest.mark.usefixtures("two_threads")
def test_items_go_side_by_side_each_on_one_thread_and_come_back_in_order() -> None:
    met = threading.Barrier(2, timeout=20)

    def item(number: int) -> tuple[int, set[int]]:
        met.wait()  # two at the same time, or it breaks
        return number, {torch.get_num_threads(), *_of_numpy()}

    with side_by_side() as run:
        found = list(run(item, range(6)))
    assert found == [(number, {1}) for number in range(6)]
    assert {torch.get_num_threads(), *_of_numpy()} == {2}


def test_on_one_thread_items_are_taken_one_after_the_other_when_asked_for() -> None:
    seen: list[int] = []
    with side_by_side() as run:
        found = run(seen.append, range(3))
        next(found)
    assert seen == [0]


@pytest.mark.usefixtures("two_threads")
def test_what_had_not_begun_when_an_item_failed_never_does() -> None:
    begun: list[int] = []

    def item(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise RuntimeError("the first")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="the first"), side_by_side() as run:
        list(run(item, range(500)))
    assert len(begun) < 500
    assert {torch.get_num_threads(), *_of_numpy()} == {2}
