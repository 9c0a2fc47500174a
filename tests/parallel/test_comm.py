"""What the ranks of a stage check of each other."""

import pytest
import torch

from ernie_engine.parallel import comm
from ernie_engine.parallel.mesh import Mesh


def test_tokens_that_differ_between_ranks_are_found(monkeypatch):
    theirs = torch.tensor([5, 6, 7])
    monkeypatch.setattr(comm, "all_gather_last", lambda x, mesh: torch.cat([x, theirs]))
    mesh = Mesh(tp_size=2)
    comm.check_equal(torch.tensor([5, 6, 7]), mesh, "tokens")
    with pytest.raises(RuntimeError, match=r"tokens differ .*\[\[5, 6, 8\], \[5, 6, 7\]\]"):
        comm.check_equal(torch.tensor([5, 6, 8]), mesh, "tokens")


def test_one_rank_agrees_with_itself():
    comm.check_equal(torch.tensor([5]), Mesh(), "tokens")


@pytest.mark.parametrize(
    ("total", "tp", "share"), [(4, 1, 4), (4, 2, 2), (4, 4, 1), (4, 8, 1), (1, 4, 1)]
)
def test_kv_heads_are_dealt_out_or_copied(total, tp, share):
    assert Mesh(tp_size=tp).share_of_kv_heads(total) == share


def test_kv_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 K/V heads cannot be dealt"):
        Mesh(tp_size=3).share_of_kv_heads(4)
