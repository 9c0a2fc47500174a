"""What the kernels keep of a row is, token for token, what the twin keeps."""

import pytest
import torch

from ernie_engine.kernels import candidates, launch, row_settings, top_filter
from ernie_engine.kernels.row_settings import find_settings
from ernie_engine.kernels.sampling import _keep_top
from ernie_engine.kernels.top_filter import find_thresholds


@pytest.fixture(autouse=True)
def small_chunks(request, monkeypatch):
    """So that small rows have several chunks, and chunks more candidates than are looked at
    together; the real sizes on a GPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(candidates, "CHUNK", 256)
        monkeypatch.setattr(candidates, "GROUP", 32)
        monkeypatch.setattr(top_filter, "CHUNK", 256)
        monkeypatch.setitem(top_filter.TABLE, (launch.DEFAULT, 256), {"WIDTH": 32, "num_warps": 4})


def find(logits, *columns):
    settings, greedy = find_settings(logits, *columns)
    return settings, greedy, find_thresholds(logits, settings)


def kept_by_twin(logits, temperature, top_k, top_p, min_p):
    z = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    z = z.masked_fill(z < min_p.double().log().float()[:, None], -torch.inf)
    filtered = (top_k > 0) | (top_p < 1)
    return z.where(~filtered[:, None], _keep_top(z, top_k, top_p)) > -torch.inf


def kept_by_kernels(logits, temperature, top_k, top_p, min_p, device):
    arguments = (t.to(device) for t in (logits, temperature, top_k, top_p, min_p))
    settings, greedy, thresholds = (t.cpu() for t in find(*arguments))
    assert torch.equal(greedy, logits.argmax(dim=-1))
    z = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    z = z.masked_fill(z < settings[:, row_settings.FLOOR.value, None], -torch.inf)
    bits = (z + 0.0).view(torch.int32).long()
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered << 20) + ((1 << 20) - 1 - torch.arange(logits.shape[1]))
    return (keys >= thresholds[:, None]) & (z > -torch.inf)


def check(logits, device, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)
    columns = [
        torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()
        for value, dtype in (
            (temperature, torch.float32),
            (top_k, torch.int64),
            (top_p, torch.float32),
            (min_p, torch.float32),
        )
    ]
    kept = kept_by_kernels(logits, *columns, device)
    assert torch.equal(kept, kept_by_twin(logits, *columns))
    return kept.sum(dim=-1).tolist()


@pytest.mark.parametrize("vocab_size", [1, 77, 700])  # of a part of a chunk; of three chunks
def test_mixed_rows(kernel_device, vocab_size):
    rows = 8
    logits = torch.randn(rows, vocab_size) * 3
    check(
        logits,
        kernel_device,
        temperature=torch.tensor([0.7, 1.0, 2.5, 0.1]).repeat(rows // 4),
        top_k=torch.tensor([0, 20, 0, 5]).repeat(rows // 4),
        top_p=torch.tensor([0.9, 1.0, 0.3, 0.8]).repeat(rows // 4),
        min_p=torch.tensor([0.0, 0.01]).repeat(rows // 2),
    )


def test_equal_tokens_are_cut_by_id_across_chunks(kernel_device):
    vocab_size = 2 * candidates.CHUNK + 5
    top_k = [1, candidates.CHUNK + 3, vocab_size + 1]
    kept = check(torch.zeros(3, vocab_size), kernel_device, top_k=top_k)
    assert kept == [1, candidates.CHUNK + 3, vocab_size]


def test_equal_tokens_are_cut_where_the_share_is_exact(kernel_device):
    assert check(torch.zeros(3, 10), kernel_device, top_p=[0.5, 0.125, 0.75]) == [5, 2, 8]


def test_a_flat_row_has_more_candidates_than_are_looked_at_together(kernel_device):
    logits = torch.randn(2, candidates.CHUNK + 100) * 0.01
    several, most = check(logits, kernel_device, top_p=[0.5, 0.999])
    assert 32 < several < most


@pytest.mark.parametrize("filters", [{"top_k": 20}, {"top_p": 0.8}, {"top_p": 0.99}], ids=str)
def test_few_tokens_are_candidates(kernel_device, monkeypatch, filters):
    gathered, make = [], top_filter.empty_candidates

    def record(*args):
        gathered.append(make(*args))
        return gathered[-1]

    monkeypatch.setattr(top_filter, "empty_candidates", record)
    size = 31 * candidates.GROUP  # more groups than choices
    check(torch.randn(1, size), kernel_device, **filters)
    ((_, counts),) = gathered
    assert counts.sum() <= (100 if "top_k" in filters else 0.3 * size)


def test_more_choices_than_groups(kernel_device):
    logits = torch.randn(1, candidates.CHUNK)
    groups = candidates.CHUNK // candidates.GROUP
    assert check(logits, kernel_device, top_k=groups) == [groups]
    assert check(logits, kernel_device, top_k=groups + 1) == [groups + 1]


def test_all_good_tokens_in_one_group(kernel_device):
    logits = torch.randn(1, 2 * candidates.CHUNK) - 50
    logits[:, 130:150] += 60
    assert check(logits, kernel_device, top_k=10, top_p=0.95)[0] <= 10


def test_forbidden_tokens_are_never_kept(kernel_device):
    logits = torch.randn(2, 50)
    logits[:, 3:] = -torch.inf
    assert check(logits, kernel_device, top_k=[10, 2]) == [3, 2]
    assert check(logits, kernel_device, top_p=0.99999) == [3, 3]


def test_no_probability_is_still_one_token(kernel_device):
    assert check(torch.randn(1, 300), kernel_device, top_p=0.0) == [1]
    assert check(torch.randn(1, 300), kernel_device, top_k=7, top_p=0.0) == [1]


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_tokens_below_the_bound_count_in_the_mass(kernel_device, top_p):
    logits = torch.full((1, 600), -13.0)  # e^-13 x 600 = 0.0014 of the best token's mass
    logits[0, 7], logits[0, 8:40] = 0.0, -4.0
    check(logits, kernel_device, top_p=top_p)


def test_a_row_without_filters_costs_no_search(kernel_device):
    settings, _, thresholds = find(
        torch.randn(3, 100).to(kernel_device),
        torch.tensor([0.0, 1.0, 0.5]).to(kernel_device),
        torch.tensor([5, 0, 0]).to(kernel_device),
        torch.ones(3).to(kernel_device),
        torch.tensor([0.0, 0.0, 0.1]).to(kernel_device),
    )
    assert settings[:, row_settings.BOUND.value].tolist() == [torch.inf] * 3
    assert thresholds.tolist() == [-(1 << 51)] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_whole_vocabulary(scale):
    rows = 64
    logits = (torch.randn(rows, 103424) * scale).bfloat16().float()  # with many ties
    pick = torch.randint(0, 4, (4, rows))
    check(
        logits,
        "cuda",
        temperature=torch.tensor([0.3, 0.8, 1.0, 2.0])[pick[0]],
        top_k=torch.tensor([0, 1, 50, 5000])[pick[1]],
        top_p=torch.tensor([1.0, 0.5, 0.8, 0.99])[pick[2]],
        min_p=torch.tensor([0.0, 0.0, 0.01, 0.2])[pick[3]],
    )
