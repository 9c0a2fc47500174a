"""Copies to the host beside the steps, and when they are there."""

import pytest
import torch

from ernie_engine.model.host_copies import HostCopies

LONG = 200_000_000  # cycles: a tenth of a second


def test_without_a_gpu_a_tensor_is_its_own_copy():
    copies, x = HostCopies(torch.device("cpu")), torch.arange(3)
    assert copies.fetch(x) is x and copies.done() is None


@pytest.mark.gpu
@pytest.mark.parametrize("fetches", [False, True])
def test_done_is_behind_what_was_launched_before(fetches):
    """Also in a step that fetches nothing: a prompt's chunk."""
    copies, x = HostCopies(torch.device("cuda")), torch.zeros(1000, device="cuda")
    x += 3
    copies.fetch(x)  # the first time kernels load, memory is pinned and the device waited for
    copies.done().synchronize()
    torch.cuda._sleep(LONG)
    x += 4
    host = copies.fetch(x) if fetches else None
    done = copies.done()
    assert not done.query()
    done.synchronize()
    assert torch.cuda.current_stream().query()
    assert host is None or (host.is_pinned() and (host == 7).all())


@pytest.mark.gpu
def test_later_kernels_do_not_wait_for_a_copy():
    """They may run while it does, and write elsewhere than where it reads."""
    copies = HostCopies(torch.device("cuda"))
    found = []
    for i in range(50):
        found.append(copies.fetch(torch.full((100_000,), i, device="cuda")))
        torch.full((100_000,), -1, device="cuda")  # would take the memory if it were free
    copies.done().synchronize()
    assert all((host == i).all() for i, host in enumerate(found))
