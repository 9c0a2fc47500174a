import math

import pytest
import torch

from ernie_engine.kernels.philox import gumbel_noise, philox4x32

ONES = 0xFFFFFFFF
KNOWN = [  # the known answers of the Random123 library: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_in_ints(counter, key, words):
    assert philox4x32(counter, key) == words


@pytest.mark.parametrize("device", DEVICES)
def test_known_answers_in_tensors(device):
    counter, key, words = (
        torch.tensor(column, device=device).T for column in zip(*KNOWN, strict=True)
    )
    assert torch.equal(torch.stack(philox4x32(tuple(counter), tuple(key))), words)


def naive_noise(seed, position, token):
    seed, position = seed % 2**64, position % 2**64
    counter = (token, position % 2**32, position >> 32, 0)
    word = philox4x32(counter, (seed % 2**32, seed >> 32))[0]
    return -math.log(-math.log((word + 0.5) / 2**32))


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_keyed_by_seed_position_and_token(device):
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 5 << 32, 5]
    positions = [0, 131071, 2**40 + 3, 7, 7, 7, 7]
    noise = gumbel_noise(
        torch.tensor(seeds, device=device), torch.tensor(positions, device=device), 5
    )
    assert noise.dtype == torch.float32
    expected = [
        [naive_noise(seed, position, token) for token in range(5)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    torch.testing.assert_close(noise.cpu(), torch.tensor(expected), rtol=1e-7, atol=1e-7)


def test_a_share_of_the_vocabulary_has_the_same_noise():
    seeds, positions = torch.tensor([3, 4]), torch.tensor([8, 9])
    whole = gumbel_noise(seeds, positions, 50)
    assert torch.equal(gumbel_noise(seeds, positions, 20, first_token=13), whole[:, 13:33])


def test_no_rows():
    none = torch.zeros(0, dtype=torch.int64)
    assert gumbel_noise(none, none, 5).shape == (0, 5)


def test_noise_is_gumbel():
    noise = gumbel_noise(torch.arange(64), torch.arange(64) * 7, 4096).double()
    n = noise.numel()
    assert abs(noise.mean() - 0.5772156649) < 5 * (math.pi**2 / 6 / n) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 0.05
    for x in (-1.0, 0.0, 1.0, 3.0, 6.0):  # the distribution function, 5 sigma
        p = math.exp(-math.exp(-x))
        assert abs((noise <= x).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
