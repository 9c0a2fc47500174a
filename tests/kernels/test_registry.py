import dataclasses
import inspect

import pytest
import torch

from ernie_engine.kernels.registry import AUTO, IMPLEMENTATIONS, Ops, select


def test_every_op_is_a_field_and_has_the_twin():
    assert [field.name for field in dataclasses.fields(Ops)] == list(IMPLEMENTATIONS)
    assert all("torch" in implementations for implementations in IMPLEMENTATIONS.values())


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_implementations_of_an_op_take_the_same_arguments(op):
    names = {tuple(inspect.signature(f).parameters) for f in IMPLEMENTATIONS[op].values()}
    assert len(names) == 1


@pytest.mark.parametrize("device_type", AUTO)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_select_takes_the_named_implementation(kernels, device_type):
    ops = select(kernels, device_type)
    for op, implementations in IMPLEMENTATIONS.items():
        assert getattr(ops, op) is implementations["torch"]


def test_ops_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        select("auto", "cpu").linear = None


@pytest.mark.parametrize("kernels", ["", "torhc", "Torch", "-linear"])
def test_unknown_implementation_is_an_error_that_lists_what_exists(kernels):
    with pytest.raises(ValueError, match=r"kernels=.*'auto', 'torch'"):
        select(kernels, "cpu")


def test_unknown_device_is_an_error():
    with pytest.raises(ValueError, match=r"device='tpu'.*cpu.*cuda"):
        select("auto", "tpu")


def test_uninitialised_memory_is_poisoned():
    x = torch.zeros(2)
    for tensor in (torch.empty(3), torch.empty_like(x), x.new_empty(3)):
        assert tensor.isnan().all()
    assert torch.empty(2, dtype=torch.int64).min() > 1 << 60
