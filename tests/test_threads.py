"""One thread for small work, and as before afterwards."""

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from tvlens.threads import one_thread


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
