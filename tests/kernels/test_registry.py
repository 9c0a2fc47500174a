import dataclasses
import inspect

import pytest
import torch

from ernie_engine.kernels import registry
from ernie_engine.kernels.registry import AUTO, IMPLEMENTATIONS, Ops, asked_for, select


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
        name = AUTO[device_type] if kernels == "auto" else kernels
        assert getattr(ops, op) is implementations[name]


def test_ops_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        select("auto", "cpu").linear = None


ERRORS = [
    ("", "use one of .*'auto', 'torch', 'triton'"),
    ("torhc", "use one of .*'auto', 'torch', 'triton'"),
    ("Torch", "use one of .*'auto', 'torch', 'triton'"),
    ("-embedding", "use one of .*'auto', 'torch', 'triton'"),
    ("torch,", "neither -OP nor OP=NAME"),
    ("torch,embedding", "neither -OP nor OP=NAME"),
    ("torch,-embeding", "no op 'embeding'; use one of .*'embedding'"),
    (
        "torch,embedding=cuda",
        r"embedding has no implementation 'cuda': use one of \['torch', 'triton'\]",
    ),
]


@pytest.mark.parametrize(("kernels", "message"), ERRORS)
def test_what_cannot_be_chosen_is_an_error_that_names_the_choices(kernels, message):
    with pytest.raises(ValueError, match=rf"kernels='{kernels}'.*ERNIE_KERNELS.*{message}"):
        select(kernels, "cuda")


def test_an_op_without_the_implementation_is_an_error(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "linear", {"torch": torch.add})
    with pytest.raises(
        ValueError, match=r"linear has no implementation 'triton'.*'triton,-linear'"
    ):
        select("triton", "cuda")
    assert select(kernels_that_exist() + ",-linear", "cuda").linear is torch.add


def kernels_that_exist():
    lacking = [op for op, names in IMPLEMENTATIONS.items() if "triton" not in names]
    return ",-".join(["triton", *lacking])


def test_single_ops_are_chosen():
    names = select(kernels_that_exist() + ",-rms_norm", "cuda").implementations()
    assert names["rms_norm"] == "torch"
    assert names["add_rms_norm"] == names["swiglu"] == "triton"
    names = select("torch, rms_norm=triton", "cuda").implementations()
    assert [op for op, name in names.items() if name == "triton"] == ["rms_norm"]


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(registry.knobs.runtime, "interpret", False)
    for kernels in ("torch,rms_norm=triton", kernels_that_exist()):
        with pytest.raises(ValueError, match=r"need a GPU.*TRITON_INTERPRET.*'torch'"):
            select(kernels, "cpu")
    assert select("torch", "cpu").implementations()["rms_norm"] == "torch"


def test_the_environment_counts_where_the_configuration_is_open(monkeypatch):
    monkeypatch.delenv("ERNIE_KERNELS", raising=False)
    assert asked_for("auto") == "auto"
    monkeypatch.setenv("ERNIE_KERNELS", "torch,rms_norm=triton")
    assert asked_for("auto") == "torch,rms_norm=triton"
    assert asked_for("torch") == "torch"


def test_calls_are_counted_by_op_if_asked():
    plain = select("torch", "cpu")
    ops = plain.counted()
    for _ in range(3):
        x = ops.swiglu(torch.ones(2, 4))
    assert torch.equal(x, plain.swiglu(torch.ones(2, 4)))
    assert ops.implementations() == plain.implementations()
    lines = dict((line.split()[0], line.split()[1:]) for line in ops.call_table().splitlines())
    assert lines.keys() == {"op", *IMPLEMENTATIONS}
    assert lines["swiglu"] == ["torch", "3"]
    assert lines["linear"] == ["torch", "0"]
    assert plain.swiglu is IMPLEMENTATIONS["swiglu"]["torch"]  # costs nothing when it is off


def test_unknown_device_is_an_error():
    with pytest.raises(ValueError, match=r"device='tpu'.*cpu.*cuda"):
        select("auto", "tpu")


def test_uninitialised_memory_is_poisoned():
    x = torch.zeros(2)
    for tensor in (torch.empty(3), torch.empty_like(x), x.new_empty(3)):
        assert tensor.isnan().all()
    assert torch.empty(2, dtype=torch.int64).min() > 1 << 60


def test_a_fusion_runs_where_all_its_parts_are_kernels():
    def chosen(kernels):
        names = select(kernels, "cuda").implementations()
        return names["norm_qkv_rope"], names["norm_router"], names["norm_moe"]

    everything = kernels_that_exist()
    assert chosen(everything) == ("triton", "triton", "triton")
    assert chosen("torch") == ("torch", "torch", "torch")
    assert chosen(f"{everything},-router") == ("triton", "parts", "parts")
    assert chosen(f"{everything},-rms_norm") == ("parts", "parts", "parts")
    assert chosen(f"{everything},-norm_qkv_rope") == ("parts", "triton", "triton")
    assert chosen(f"{everything},-norm_moe") == ("triton", "triton", "parts")
    assert chosen(f"{everything},-moe_experts") == ("triton", "triton", "parts")
    assert chosen("torch,norm_router=triton") == ("torch", "triton", "parts")
    of_mlp = (
        select(f"{everything},-{op}", "cuda").implementations()["norm_swiglu"]
        for op in ("router", "swiglu", "norm_swiglu")
    )
    assert tuple(of_mlp) == ("triton", "parts", "parts")
    with pytest.raises(ValueError, match="linear has no implementation 'parts'"):
        select("torch,linear=parts", "cuda")


def test_the_parts_of_a_fusion_are_those_chosen(monkeypatch):
    seen = []

    def router(x, *rest):
        seen.append(len(x))
        return IMPLEMENTATIONS["router"]["torch"](x, *rest)

    monkeypatch.setitem(IMPLEMENTATIONS["router"], "mine", router)
    ops = select("torch,router=mine", "cpu")
    x, norm, weight, bias = torch.randn(2, 8), torch.ones(8), torch.randn(4, 8), torch.zeros(4)
    out = ops.norm_router(x, x, norm, 1e-5, weight, bias, 2, 1e-12)
    assert seen == [2] and ops.implementations()["norm_router"] == "parts"
    expected = select("torch", "cpu").norm_router(x, x, norm, 1e-5, weight, bias, 2, 1e-12)
    assert all(map(torch.equal, out, expected))
