import torch

from ernie_engine.kernels import launch
from ernie_engine.kernels.launch import DEFAULT, architecture, pick

TABLE = {
    (DEFAULT, 16): {"BLOCK": 1},
    (DEFAULT, 64): {"BLOCK": 2},
    ("sm_90", 32): {"BLOCK": 3},
}


def test_the_smallest_bucket_that_holds_the_size():
    cpu = torch.device("cpu")
    assert [pick(TABLE, cpu, n)["BLOCK"] for n in (0, 1, 16, 17, 64, 65, 10**6)] == [
        *(1, 1, 1, 2, 2, 2, 2)
    ]


def test_an_architecture_has_its_own_rows_or_the_default_ones(monkeypatch):
    architecture.cache_clear()
    for arch, block in (("sm_90", 3), ("sm_80", 2)):
        monkeypatch.setattr(launch, "architecture", lambda device, arch=arch: arch)
        assert pick(TABLE, torch.device("cuda:0"), 40)["BLOCK"] == block
