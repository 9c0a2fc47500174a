import math

import pytest
import torch

from ernie_engine.kernels import sampling
from ernie_engine.kernels.philox import gumbel_noise


@pytest.fixture
def many(few):
    """many(n): n draws, of which the interpreter is spared: a kernel keeps what the twin keeps
    (test_top_filter.py), and draws of the mixed rows are compared one by one."""

    def count(n):
        if few(n, 0) == 0:
            pytest.skip(f"{n} rows under the interpreter")
        return n

    return count


def draw(
    sample, device, logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0
):
    """`sample` with each parameter given for all rows at once or as a list, one for each."""
    rows = len(logits)

    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous().to(device)

    tokens = sample(
        logits.to(device),
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(position, torch.int64),
    )
    assert tokens.dtype == torch.int64
    assert tokens.shape == (rows,)
    return tokens.cpu()


def naive_kept(logits, temperature, top_k, top_p, min_p):
    """The tokens that survive the filters, and z = logits / temperature: Python floats."""
    z = [x / temperature for x in logits]
    weights = {v: math.exp(x - max(z)) for v, x in enumerate(z)}
    best = max(weights.values())
    kept = [v for v in weights if weights[v] >= min_p * best and weights[v] > 0]
    kept.sort(key=lambda v: (-z[v], v))
    kept = kept[: top_k or None]
    total, reached, nucleus = sum(weights[v] for v in kept), 0.0, []
    for v in kept:
        nucleus.append(v)
        reached += weights[v] / total
        if reached >= top_p:
            break
    return nucleus, z


def naive_draw(logits, temperature, top_k, top_p, min_p, noise):
    if temperature == 0:
        return logits.index(max(logits))
    kept, z = naive_kept(logits, temperature, top_k, top_p, min_p)
    return max(kept, key=lambda v: (z[v] + noise[v], -v))


@pytest.mark.parametrize("vocab_size", [1, 2, 13, 257])
def test_any_mix_of_parameters(sample, device, few, vocab_size):
    rows = few(400, 12)

    def pick(*values):
        return torch.tensor(values)[torch.randint(0, len(values), (rows,))]

    logits = torch.randn(rows, vocab_size) * 3
    logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(rows, vocab_size - 1) < 0.1, -torch.inf)
    temperature = pick(0.0, 0.3, 1.0, 2.5)
    top_k = pick(0, 1, 2, 5, 40, 1000)
    top_p, min_p = pick(1.0, 0.02, 0.5, 0.8, 0.95), pick(0.0, 0.0, 0.05, 0.3, 1.0)
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 10**6, (rows,))
    noise = gumbel_noise(seeds, positions, vocab_size).tolist()
    tokens = draw(sample, device, logits, temperature, top_k, top_p, min_p, seeds, positions)
    for row, token in enumerate(tokens.tolist()):
        parameters = (x[row].item() for x in (temperature, top_k, top_p, min_p))
        assert token == naive_draw(logits[row].tolist(), *parameters, noise[row])


def test_no_rows(sample, device):
    assert draw(sample, device, torch.zeros(0, 7)).tolist() == []


def test_greedy_ties_go_to_the_lower_id(sample, device):
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0], [5.0, 1.0, 5.0, 5.0]]).repeat(1, 500)
    assert draw(sample, device, logits, temperature=0.0).tolist() == [1, 0]
    assert draw(sample, device, logits, temperature=[0.0, 1.0]).tolist()[0] == 1


def test_tiny_temperature_is_nearly_greedy(sample, device):
    logits = torch.randn(5, 50) * 100
    tokens = draw(sample, device, logits, temperature=1e-38, position=torch.arange(5))
    assert tokens.tolist() == logits.argmax(dim=1).tolist()


def chi_square_limit(degrees):
    """The value that a chi-square exceeds once in 10,000 (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}]
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_have_the_right_distribution(sample, device, many, filters, vary):
    draws, temperature = many(20000), 0.7
    logits = torch.randn(13) * 1.2
    rows = logits.expand(draws, -1)
    tokens = draw(sample, device, rows, temperature, **filters, **{vary: torch.arange(draws)})
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    kept, z = naive_kept(logits.tolist(), temperature, **full)
    counts = tokens.bincount(minlength=13)
    assert set(counts.nonzero().flatten().tolist()) <= set(kept)
    total = sum(math.exp(z[v]) for v in kept)
    expected = {v: draws * math.exp(z[v]) / total for v in kept}
    chi_square = sum((counts[v].item() - expected[v]) ** 2 / expected[v] for v in kept)
    assert chi_square < chi_square_limit(len(kept) - 1)


def test_top_k_keeps_exactly_k_of_equal_tokens(sample, device, many):
    num_rows = many(500)
    rows = torch.ones(num_rows, 3000)
    rows[:, 1500] = 2.0
    tokens = draw(sample, device, rows, top_k=4, position=torch.arange(num_rows))
    assert set(tokens.tolist()) == {1500, 0, 1, 2}


def test_top_p_keeps_the_fewest_tokens_that_reach_it(sample, device, many):
    num_rows = many(2000)
    rows = torch.tensor([0.25, 0.5, 0.125, 0.125]).log().expand(num_rows, 4)

    def kept(top_p):
        tokens = draw(sample, device, rows, top_p=top_p, position=torch.arange(num_rows))
        return set(tokens.tolist())

    assert kept(0.0) == kept(0.01) == kept(0.49) == {1}
    assert kept(0.74) == {0, 1}
    assert kept(0.76) == kept(0.87) == {0, 1, 2}  # of the equal ones the lower id
    assert kept(0.88) == kept(1.0) == {0, 1, 2, 3}


def test_min_p_comes_before_top_p(sample, device, many):
    # min-p leaves {0, 1}; of these top-p 0.7 needs only token 0 (0.5 / 0.7 = 0.71).
    num_rows = many(500)
    rows = torch.tensor([0.5, 0.2, 0.15, 0.15]).log().expand(num_rows, 4)
    tokens = draw(sample, device, rows, min_p=0.35, top_p=0.7, position=torch.arange(num_rows))
    assert set(tokens.tolist()) == {0}


def test_a_draw_does_not_know_its_company(sample, device, few):
    rows = few(24, 12)
    logits = torch.randn(rows, 101)
    parameters = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.7]).repeat(rows // 4),
        "top_k": torch.tensor([0, 0, 7]).repeat(rows // 3),
        "top_p": torch.tensor([1.0, 0.9]).repeat(rows // 2),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.02]).repeat(rows // 4),
        "seed": torch.arange(rows) // 2,
        "position": torch.arange(rows) % 5,
    }
    together = draw(sample, device, logits, **parameters)
    order = torch.randperm(rows)
    shuffled = {name: value[order] for name, value in parameters.items()}
    assert torch.equal(draw(sample, device, logits[order], **shuffled), together[order])
    for row in range(0, rows, few(1, 5)):
        alone = {name: value[row : row + 1] for name, value in parameters.items()}
        assert draw(sample, device, logits[row : row + 1], **alone) == together[row]


def test_seed_and_position_change_the_draw(sample, device, few):
    num_rows = few(200, 20)
    rows = torch.zeros(num_rows, 1000)
    for vary in ("seed", "position"):
        tokens = draw(sample, device, rows, **{vary: torch.arange(num_rows)})
        assert len(set(tokens.tolist())) > 0.75 * num_rows
    assert len(set(draw(sample, device, rows, seed=5, position=9).tolist())) == 1


def test_twin_sorts_only_rows_with_a_filter(monkeypatch):
    sorted_rows, keep_top = [], sampling._keep_top

    def record(logits, top_k, top_p):
        sorted_rows.append(len(logits))
        return keep_top(logits, top_k, top_p)

    monkeypatch.setattr(sampling, "_keep_top", record)
    logits = torch.randn(4, 9)
    draw(sampling.sample_torch, "cpu", logits, min_p=0.1)
    draw(sampling.sample_torch, "cpu", logits, temperature=0.0, top_k=3)
    assert sorted_rows == []
    draw(sampling.sample_torch, "cpu", logits, top_k=[0, 3, 0, 0], top_p=[1.0, 1.0, 1.0, 0.5])
    assert sorted_rows == [2]


@pytest.mark.parametrize("vocab_size", [500, 5000])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.8, 1.0), (0.8, 0.7)])
def test_what_is_known_to_be_off_changes_no_token(
    sample, device, few, temperature, top_p, vocab_size
):
    rows = few(16, 2)
    logits = torch.randn(rows, vocab_size).to(device)

    def column(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype, device=device)

    values = column(temperature), column(0, torch.int64), column(top_p), column(0.0)
    seeds = torch.arange(rows).to(device)
    everything = sample(logits, *values, seeds, seeds + 7)
    draws, filters = temperature > 0, top_p < 1
    assert torch.equal(sample(logits, *values, seeds, seeds + 7, draws, filters), everything)
