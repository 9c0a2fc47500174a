"""Loading: every layer's parts, both name schemes, every broken checkpoint, bounded memory."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from ernie_engine.model import weights
from ernie_engine.model.checkpoint import INDEX, Checkpoint
from ernie_engine.model.weights import fill_dummy, load_weights
from ernie_engine.parallel.layers import (
    ExpertWeights,
    GateUpWeight,
    QKVWeight,
    RowParallelLinear,
    VocabParallel,
    WeightPart,
    empty_weight,
    whole_part,
)
from ernie_engine.parallel.mesh import Mesh, Placement

H, I, E, V, D = 12, 8, 3, 10, 4  # hidden, expert width, experts, vocabulary, head_dim
P = "model.layers.0"
BIAS = f"{P}.mlp.moe_statics.e_score_correction_bias"
MTP = ("model.mtp_block.0.input_layernorm.weight", "model.mtp_linear_proj.0.weight")


class Toy(nn.Module):
    """One of each layer, named as in the model; no forward."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype, kv_heads: int):
        super().__init__()
        place, linear = Placement(mesh, dtype, torch.device("cpu")), nn.functional.linear
        self.embed = VocabParallel(V, H, place)
        self.qkv_proj = QKVWeight(H, 4, kv_heads, D, place)
        self.o_proj = RowParallelLinear(4 * D, H, place, linear)
        self.gate_up_proj = GateUpWeight(H, 6, place)
        self.gate_bias = empty_weight(E, place=place, dtype=torch.float32)
        self.experts = ExpertWeights(E, H, I, place)
        self.norm = empty_weight(H, place=place)

    def parts(self):
        yield whole_part("model.norm.weight", self.norm)
        yield from self.experts.parts(f"{P}.mlp.experts")
        yield from self.qkv_proj.parts(*(f"{P}.self_attn.{n}_proj.weight" for n in "qkv"))
        yield from self.o_proj.parts(f"{P}.self_attn.o_proj.weight")
        yield from self.gate_up_proj.parts(f"{P}.mlp.gate_proj.weight", f"{P}.mlp.up_proj.weight")
        yield whole_part(BIAS, self.gate_bias, (1, E))
        yield from self.embed.parts("model.embed_tokens.weight")

    def load(self, folder: Path, **options) -> "Toy":
        parameters = dict(self.named_parameters())
        load_weights(self.parts(), parameters, Checkpoint.open(folder), progress=False, **options)
        return self


def toy(tp_size: int = 1, tp_rank: int = 0, dtype=torch.float32, kv_heads: int = 2) -> Toy:
    return Toy(Mesh(tp_size=tp_size, tp_rank=tp_rank), dtype, kv_heads)


def toy_tensors(dtype=torch.float32, kv_heads: int = 2) -> dict[str, Tensor]:
    """A random checkpoint for Toy, by hub name; the bias is F32 as in real ones."""
    torch.manual_seed(0)
    wanted = {part.name: part.shape for part in toy(kv_heads=kv_heads).parts()}
    return {
        name: torch.randn(shape).to(torch.float32 if name == BIAS else dtype)
        for name, shape in wanted.items()
    }


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of transformers' modules."""
    rest = {name: t for name, t in tensors.items() if ".experts." not in name and name != BIAS}

    def stack(kind: str) -> Tensor:
        return torch.stack([tensors[f"{P}.mlp.experts.{e}.{kind}_proj.weight"] for e in range(E)])

    rest[f"{P}.mlp.experts.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], dim=1)
    rest[f"{P}.mlp.experts.down_proj"] = stack("down")
    rest[f"{P}.mlp.gate.moe_statics.e_score_correction_bias"] = tensors[BIAS].flatten()
    return rest


def write(folder: Path, *shards: dict[str, Tensor], index: bool = True) -> Path:
    """One model.safetensors, or shards with their index."""
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    if index:
        pairs = [(t, name) for name, s in zip(names, shards, strict=True) for t in s]
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(pairs)}))
    return folder


def split(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Dealt like cards, so that the experts of a layer straddle shards."""
    return [dict(list(tensors.items())[i::count]) for i in range(count)]


def assert_holds(model: Toy, tensors: dict[str, Tensor]) -> None:
    for part in model.parts():
        assert torch.equal(part.dst, tensors[part.name][part.index].to(part.dst.dtype)), part.name


# What is loaded


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("names", [dict, fused], ids=["hub", "fused"])
def test_values_arrive(tmp_path, names, count):
    tensors = toy_tensors()
    model = toy().load(write(tmp_path, *split(names(tensors), count)))
    assert_holds(model, tensors)
    experts = [tensors[f"{P}.mlp.experts.2.{k}_proj.weight"] for k in ("gate", "up", "down")]
    assert torch.equal(model.experts.gate_up[2], torch.cat(experts[:2]))
    assert torch.equal(model.experts.down[2], experts[2])
    assert torch.equal(model.gate_bias, tensors[BIAS][0])


@pytest.mark.parametrize("names", [dict, fused], ids=["hub", "fused"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_ranks_make_the_whole(tmp_path, names, kv_heads):
    tensors = toy_tensors(kv_heads=kv_heads)
    folder = write(tmp_path, *split(names(tensors), 2))
    one, two = (toy(2, rank, kv_heads=kv_heads).load(folder) for rank in (0, 1))
    whole = toy(kv_heads=kv_heads).load(folder)
    assert torch.equal(torch.cat([one.embed.weight, two.embed.weight]), whole.embed.weight)
    assert torch.equal(torch.cat([one.o_proj.weight, two.o_proj.weight], 1), whole.o_proj.weight)
    assert torch.equal(torch.cat([one.experts.down, two.experts.down], 2), whole.experts.down)
    pairs = zip(one.experts.gate_up.chunk(2, 1), two.experts.gate_up.chunk(2, 1), strict=True)
    joined = torch.cat([half for pair in pairs for half in pair], 1)
    assert torch.equal(joined, whole.experts.gate_up)
    pairs = zip(one.gate_up_proj.weight.chunk(2), two.gate_up_proj.weight.chunk(2), strict=True)
    joined = torch.cat([half for pair in pairs for half in pair])
    assert torch.equal(joined, whole.gate_up_proj.weight)
    halves = [model.qkv_proj.weight.split(model.qkv_proj.sizes) for model in (one, two)]
    q, k, v = whole.qkv_proj.weight.split(whole.qkv_proj.sizes)
    assert torch.equal(torch.cat([halves[0][0], halves[1][0]]), q)
    for i, expected in ((1, k), (2, v)):
        seen = halves[0][i] if kv_heads == 1 else torch.cat([halves[0][i], halves[1][i]])
        assert torch.equal(seen, expected)
    assert torch.equal(one.norm, two.norm) and torch.equal(one.gate_bias, two.gate_bias)


@pytest.mark.parametrize("tp_size", [3, 4, 8])
def test_a_vocabulary_that_does_not_divide_is_padded(tp_size):
    """V = 10: the last ranks hold fewer rows, or none; what they do not hold is zeros."""
    place = [Placement(Mesh(tp_size=tp_size, tp_rank=r), torch.float32, torch.device("cpu"))
             for r in range(tp_size)]  # fmt: skip
    tables = [VocabParallel(V, H, p) for p in place]
    values = torch.arange(1.0, 1.0 + V * H).view(V, H)
    for table in tables:
        for part in table.parts("model.embed_tokens.weight"):
            assert part.shape == (V, H)
            part.dst.copy_(values[part.index])
    joined = torch.cat([table.table for table in tables])
    assert torch.equal(joined[:V], values) and not joined[V:].any()
    assert len({len(table.table) for table in tables}) == 1
    assert sum(table.weight.numel() for table in tables) == V * H


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_experts_are_dealt_out_whole(tmp_path, num_ranks):
    tensors = toy_tensors()
    folder, held = write(tmp_path, tensors), []
    for rank in range(num_ranks):
        mesh = Mesh(tp_size=num_ranks, tp_rank=rank, expert_parallel=True)
        experts = ExpertWeights(E, H, I, Placement(mesh, torch.float32, torch.device("cpu")))
        parameters, parts = dict(experts.named_parameters()), experts.parts(f"{P}.mlp.experts")
        checkpoint = Checkpoint.open(folder)
        load_weights(parts, parameters, checkpoint, checkpoint.shapes, progress=False)
        assert experts.first == rank * E // num_ranks
        held.append(experts)
    down = torch.cat([experts.down for experts in held])
    assert down.shape == (E, H, I)
    for e in range(E):
        assert torch.equal(down[e], tensors[f"{P}.mlp.experts.{e}.down_proj.weight"])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted_and_the_bias_stays_fp32(tmp_path, stored, run):
    tensors = toy_tensors(stored)
    tensors[BIAS] += 20.0
    model = toy(dtype=run).load(write(tmp_path, tensors))
    assert_holds(model, tensors)
    assert model.norm.dtype == run
    assert torch.equal(model.gate_bias, tensors[BIAS][0])


@pytest.mark.parametrize("shape", [(E,), (1, E)])
@pytest.mark.parametrize("gate", ["gate.", ""])
def test_bias_of_either_rank_and_name(tmp_path, shape, gate):
    tensors = toy_tensors()
    values = tensors.pop(BIAS)
    name = f"{P}.mlp.{gate}moe_statics.e_score_correction_bias"
    folder = write(tmp_path, tensors | {name: values.reshape(shape)})
    assert Checkpoint.open(folder).shapes[BIAS] == (1, E)
    assert torch.equal(toy().load(folder).gate_bias, values[0])


@given(st.data())
def test_fused_views_are_the_hubs_tensors(tmp_path_factory, data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    experts, width, hidden = draw(1, 4), draw(1, 5), draw(1, 5)
    folder, count = tmp_path_factory.mktemp("fused"), experts * width * hidden
    gate_up = torch.arange(2.0 * count).view(experts, 2 * width, hidden)
    down = -torch.arange(1.0 * count).view(experts, hidden, width)
    prefix = f"model.layers.{draw(0, 20)}.mlp.experts"
    write(folder, {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down})
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.shapes) == 3 * experts
    e = draw(0, experts - 1)
    hub = {"gate": gate_up[e, :width], "up": gate_up[e, width:], "down": down[e]}
    for kind, expected in hub.items():
        name = f"{prefix}.{e}.{kind}_proj.weight"
        assert checkpoint.shapes[name] == tuple(expected.shape)
        start = [draw(0, n - 1) for n in expected.shape]
        index = tuple(slice(a, draw(a + 1, n)) for a, n in zip(start, expected.shape, strict=True))
        index = data.draw(st.sampled_from([index, (slice(None), index[1]), (slice(None),) * 2]))
        stored = checkpoint.tensors[name]
        read = weights.Shard(stored.file).read(stored, index)
        assert torch.equal(read, expected[index])


def test_shapes_and_stored_order(tmp_path):
    tensors = toy_tensors()
    checkpoint = Checkpoint.open(write(tmp_path, *split(tensors, 3)))
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    files = [stored.file for stored in checkpoint.tensors.values()]
    assert files == sorted(files)


def test_a_stage_is_judged_by_what_the_whole_model_holds(tmp_path):
    """It leaves other stages' tensors alone, but not what no stage knows, nor what one lacks."""
    tensors = toy_tensors()
    norm = torch.empty(H)
    stage = [whole_part("model.norm.weight", norm)]
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def load(folder, tensors):
        folder.mkdir()
        write(folder, tensors)
        load_weights(stage, {"norm": norm}, Checkpoint.open(folder), expected, progress=False)

    load(tmp_path / "whole", tensors)
    assert torch.equal(norm, tensors["model.norm.weight"])
    with pytest.raises(ValueError, match="unexpected: stray"):
        load(tmp_path / "more", tensors | {"stray": torch.zeros(1)})
    del tensors[f"{P}.self_attn.o_proj.weight"]
    with pytest.raises(ValueError, match=r"missing: .*o_proj"):
        load(tmp_path / "fewer", tensors)


def test_giving_up_between_two_parts_ends_the_load(tmp_path):
    folder, num_parts = write(tmp_path, toy_tensors()), []

    def give_up() -> None:
        num_parts.append(1)
        if len(num_parts) == 3:
            raise RuntimeError("rank 1 is gone")

    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        toy().load(folder, on_part=give_up)
    assert len(num_parts) == 3


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    folder, opened = write(tmp_path, *split(toy_tensors(), 3)), []
    checkpoint, real = Checkpoint.open(folder), weights.Shard

    def counting(file):
        opened.append(file.name)
        return real(file)

    monkeypatch.setattr(weights, "Shard", counting)
    model = toy()
    load_weights(model.parts(), dict(model.named_parameters()), checkpoint, progress=False)
    assert len(opened) == len(set(opened)) == 3


def test_progress_counts_the_bytes_that_this_rank_reads(tmp_path, capsys):
    folder = write(tmp_path, toy_tensors(torch.bfloat16))
    model = toy(2, 1)
    parameters = dict(model.named_parameters())
    load_weights(model.parts(), parameters, Checkpoint.open(folder))
    num_bytes = 2 * sum(p.numel() for p in parameters.values()) + 2 * E  # the bias is F32
    shown = capsys.readouterr().err
    assert f"{num_bytes / 1000:.2f}k/{num_bytes / 1000:.2f}k" in shown and "B/s" in shown
    load_weights(model.parts(), parameters, Checkpoint.open(folder), progress=False)
    assert not capsys.readouterr().err


def test_transformers_writes_and_dumps_the_same_tensors(tmp_path):
    """save_pretrained has hub names, a dumped state_dict the modules' own and a spare head."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    moe = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**sizes, **heads, **moe))
    saved, dumped = tmp_path / "saved", tmp_path / "dumped"
    model.save_pretrained(saved, max_shard_size="20kB")
    dumped.mkdir()
    write(dumped, {name: t.clone() for name, t in model.state_dict().items()})
    one, two = Checkpoint.open(saved), Checkpoint.open(dumped)
    assert len({stored.file for stored in one.tensors.values()}) > 1
    assert dict(two.shapes) == {**one.shapes, "lm_head.weight": (40, 32)}
    filled = []
    for checkpoint in (one, two):
        parameters = {name: torch.full(shape, 9.0) for name, shape in one.shapes.items()}
        parts = [whole_part(name, parameter) for name, parameter in parameters.items()]
        load_weights(parts, parameters, checkpoint, progress=False)
        filled.append(parameters)
    assert all(torch.equal(filled[0][name], filled[1][name]) for name in one.shapes)


# What is left out


def test_mtp_is_skipped_in_one_log_line(tmp_path, caplog):
    tensors = toy_tensors() | {name: torch.ones(2, 2) for name in MTP}
    with caplog.at_level(logging.INFO, logger=weights.__name__):
        toy().load(write(tmp_path, tensors))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "2 tensors of the checkpoint are skipped"
    ]
    with pytest.raises(ValueError, match=r"2 unexpected: model\.mtp_block"):
        toy().load(tmp_path, skip=())


def test_a_copy_of_the_tied_head_is_left_out(tmp_path, caplog):
    tensors = toy_tensors()
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    with caplog.at_level(logging.INFO, logger=weights.__name__):
        toy().load(write(tmp_path, *split(tensors | copy, 2)))
    assert "lm_head.weight is skipped" in caplog.text


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t.double(), lambda t: t[1:]])
def test_a_tied_head_of_other_values_is_refused(tmp_path, change):
    tensors = toy_tensors()
    head = change(tensors["model.embed_tokens.weight"]).contiguous().clone()
    write(tmp_path, tensors | {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head\.weight .*tie_word_embeddings to false"):
        toy().load(tmp_path)


# Checkpoints that do not fit the model


def test_all_problems_are_reported_together_and_nothing_is_read(tmp_path):
    tensors = toy_tensors()
    del tensors["model.norm.weight"], tensors[f"{P}.mlp.experts.1.up_proj.weight"]
    tensors[f"{P}.self_attn.o_proj.weight"] = torch.zeros(H, 4 * D + 1)
    model = toy()
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with pytest.raises(ValueError) as caught:
        model.load(write(tmp_path, tensors | {"model.extra": torch.zeros(5)}))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert (
        f"2 missing: model.norm.weight (12,), {P}.mlp.experts.1.up_proj.weight (8, 12)" in message
    )
    assert f"{P}.self_attn.o_proj.weight (expected (12, 16), found (12, 17))" in message
    assert "1 unexpected: model.extra (5,)" in message
    assert all((parameter == 7).all() for parameter in model.parameters())


def test_long_reports_are_cut(tmp_path):
    strays = {f"stray.{i}": torch.zeros(1) for i in range(500)}
    with pytest.raises(ValueError, match=r"500 unexpected.*and 492 more") as caught:
        toy().load(write(tmp_path, toy_tensors() | strays))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", [(E, 2 * I + 1, H), (E, 2 * I + 2, H), (E + 1, 2 * I, H), (E, H)])
def test_fused_experts_of_another_shape(tmp_path, shape):
    tensors = fused(toy_tensors()) | {f"{P}.mlp.experts.gate_up_proj": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"mlp\.experts\."):
        toy().load(write(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool])
def test_other_dtypes_are_called_quantized(tmp_path, dtype):
    tensors = toy_tensors() | {"model.norm.weight": torch.zeros(H).to(dtype)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight .*quantized"):
        Checkpoint.open(write(tmp_path, tensors))


# Broken folders


def expect(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        toy().load(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:40],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: b"<html>404</html>" * 9,
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_corrupt_files_are_named(tmp_path, spoil, count):
    write(tmp_path, *split(toy_tensors(), count))
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    victim.write_bytes(spoil(victim.read_bytes()))
    expect(tmp_path, str(victim), "download it again")


def test_file_cut_between_open_and_load(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path, toy_tensors()))
    file, model = tmp_path / "model.safetensors", toy()
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_weights(model.parts(), dict(model.named_parameters()), checkpoint, progress=False)


def test_file_cut_while_it_is_read(tmp_path, monkeypatch):
    file = write(tmp_path, toy_tensors()) / "model.safetensors"

    class Cutting(weights.tqdm):
        def update(self, n: float | None = 1):
            os.truncate(file, 1000)
            return super().update(n)

    monkeypatch.setattr(weights, "tqdm", Cutting)
    expect(tmp_path, str(file), "cannot read", "_proj.weight", "changed while")


def test_missing_shard(tmp_path):
    write(tmp_path, *split(toy_tensors(), 3))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    expect(tmp_path, "model-00002-of-00003.safetensors", "download")


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path):
    write(tmp_path, *split(toy_tensors(), 2))
    edit_index(tmp_path, lambda places: places.update({"model.ghost": SECOND}))
    expect(tmp_path, SECOND, "lacks model.ghost")


def test_shard_holds_what_the_index_does_not_know(tmp_path):
    write(tmp_path, *split(toy_tensors(), 2))
    edit_index(tmp_path, lambda places: places.pop("model.norm.weight"))
    expect(tmp_path, FIRST, "holds model.norm.weight", INDEX)


def test_tensor_in_two_shards(tmp_path):
    one, two = split(toy_tensors(), 2)
    write(tmp_path, one, two | {"model.norm.weight": torch.zeros(H)})
    edit_index(tmp_path, lambda places: places.update({"model.norm.weight": FIRST}))
    expect(tmp_path, SECOND, "model.norm.weight")
    (tmp_path / INDEX).unlink()
    expect(tmp_path, FIRST, SECOND, "model.norm.weight", "remove one")


def test_the_same_expert_fused_and_not(tmp_path):
    tensors = toy_tensors()
    write(tmp_path, tensors | {f"{P}.mlp.experts.down_proj": torch.zeros(E, H, I)})
    expect(tmp_path, f"{P}.mlp.experts.0.down_proj.weight", "remove one")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", "", 3, None])
def test_index_that_points_elsewhere(tmp_path, shard):
    write(tmp_path, *split(toy_tensors(), 2))
    edit_index(tmp_path, lambda places: places.update({"model.norm.weight": shard}))
    expect(tmp_path, INDEX, "model.norm.weight")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(tmp_path, text):
    write(tmp_path, *split(toy_tensors(), 2))
    (tmp_path / INDEX).write_text(text)
    expect(tmp_path, INDEX, "download it again")


def test_index_beside_a_whole_file(tmp_path):
    write(tmp_path, *split(toy_tensors(), 2))
    write(tmp_path, toy_tensors())
    expect(tmp_path, INDEX, "model.safetensors", "remove the one")


def test_folders_without_index(tmp_path):
    tensors = toy_tensors()
    expect(tmp_path / "nowhere", "no *.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    expect(tmp_path, "no *.safetensors")
    write(tmp_path, *split(tensors, 3), index=False)
    assert_holds(toy().load(tmp_path), tensors)
    (tmp_path / "model-00003-of-00003.safetensors").rename(tmp_path / "third.safetensors")
    expect(tmp_path, "lacks model-00003-of-00003.safetensors")
    write(tmp_path, tensors)
    assert_holds(toy().load(tmp_path), tensors)


def test_lone_file_of_any_name_and_two_that_compete(tmp_path):
    tensors = toy_tensors()
    save_file(tensors, tmp_path / "ernie.safetensors")
    assert_holds(toy().load(tmp_path), tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    expect(tmp_path, "adapter.safetensors, ernie.safetensors", INDEX)


# The proof: a module that yields wrong parts is our mistake


def cut_parts(folder: Path, change) -> None:
    model = toy()
    parts = change(list(model.parts()))
    parameters = dict(model.named_parameters())
    load_weights(parts, parameters, Checkpoint.open(folder), progress=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[1:],  # norm never filled
        lambda parts: [*parts, parts[0]],  # norm filled twice
        lambda parts: [*parts[:3], parts[2], *parts[4:]],  # right count, one twice and one never
    ],
)
def test_gaps_and_overlaps_are_caught(tmp_path, change):
    write(tmp_path, toy_tensors())
    with pytest.raises(AssertionError, match="exactly once"):
        cut_parts(tmp_path, change)


def test_parts_outside_the_parameters_are_caught(tmp_path):
    write(tmp_path, toy_tensors())
    stray = WeightPart("model.norm.weight", (H,), (slice(None),), torch.zeros(H))
    with pytest.raises(AssertionError, match="no parameter"):
        cut_parts(tmp_path, lambda parts: [*parts[1:], stray])
    wrong = WeightPart("model.norm.weight", (H,), (slice(0, 1),), torch.zeros(H))
    with pytest.raises(AssertionError, match="a cut"):
        cut_parts(tmp_path, lambda parts: [wrong, *parts[1:]])


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_interleaved_parts_are_tiles_too(rows, cols, steps, repeat):
    whole = torch.empty(rows * steps, cols)
    views = [whole[i::steps] for i in range(steps)]
    assert weights._tile(whole, views)
    views[-1] = views[0] if repeat and steps > 1 else views[-1][:-1]
    assert not weights._tile(whole, views)


# Dummy weights

DUMMY_SHAPES = {
    "model.embed_tokens.weight": (500, 64),
    "lm_head.weight": (500, 64),
    "model.norm.weight": (64,),
    **{
        f"model.layers.{i}.{name}": shape
        for i in (0, 11)
        for name, shape in {
            "input_layernorm.weight": (64,),
            "post_attention_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (128, 64),
            "self_attn.o_proj.weight": (64, 128),
            "mlp.up_proj.weight": (128, 64),
            "mlp.down_proj.weight": (64, 64),
            "mlp.gate.weight": (64, 64),
            "mlp.moe_statics.e_score_correction_bias": (1, 64),
            "mlp.experts.3.gate_proj.weight": (64, 64),
            "mlp.experts.3.down_proj.weight": (64, 32),
            "mlp.shared_experts.down_proj.weight": (64, 64),
        }.items()
    },
}


def dummy_weights(names=DUMMY_SHAPES, dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    """Filled tensors by hub name, each a part of its own; drawn in the order of `names`."""
    tensors = {n: torch.full(DUMMY_SHAPES[n], float("nan"), dtype=dtype) for n in names}
    fill_dummy([whole_part(name, tensor) for name, tensor in tensors.items()], seed)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dummy_recipe(dtype):
    for name, tensor in dummy_weights(dtype=dtype).items():
        values = tensor.double()
        if "norm" in name or name.endswith("bias"):
            assert (values == (1.0 if "norm" in name else 0.0)).all(), name
            continue
        small = re.search(r"o_proj|down", name)
        std = 1.0 if "embed" in name else 0.002 if small else 0.02
        assert values.isfinite().all()
        assert values.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(values.mean().item()) < std / 20, name
        assert (values != 0).double().mean() > 0.99


def test_dummy_depends_on_seed_and_name_only():
    one, other = dummy_weights(seed=3), dummy_weights(seed=4)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    two = dummy_weights(reversed(DUMMY_SHAPES), seed=3)  # as a stage with other layers would
    assert torch.equal(before, torch.get_rng_state())
    matrices = [name for name, t in one.items() if t.ndim > 1 and not name.endswith("bias")]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    gates = [one[f"model.layers.{i}.mlp.gate.weight"] for i in (0, 11)]
    assert not torch.equal(*gates)


def test_dummy_weights_are_the_same_model_at_any_cut(tp_size=2):
    whole = toy()
    fill_dummy(whole.parts())
    parts = {part.name: part.dst for part in whole.parts()}
    for tp_rank in range(tp_size):
        model = toy(tp_size, tp_rank)
        fill_dummy(model.parts())
        for part in model.parts():
            assert torch.equal(part.dst, parts[part.name][part.index].view(part.dst.shape))


@pytest.mark.parametrize("name", ["layers.0.mlp.scales", "layers.x.mlp.gate.bias", "weight", ""])
def test_dummy_refuses_what_it_has_no_recipe_for(name):
    with pytest.raises(AssertionError, match="no recipe"):
        fill_dummy([whole_part(name, torch.zeros(2))])


def test_dummy_routes_are_balanced():
    """32 random tokens hit nearly all of 64 experts (expected 61): top-6 of softmax(h @ W.T)."""
    embedding, router = torch.empty(1000, 256), torch.empty(64, 256)
    names = "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"
    fill_dummy([whole_part(*pair) for pair in zip(names, (embedding, router), strict=True)])
    tokens = torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(0))
    hidden = nn.functional.rms_norm(embedding[tokens], (256,))
    ids = (hidden @ router.T).topk(6).indices
    assert len(ids.unique()) >= 56


# Memory

LOAD = """
import sys, torch
from ernie_engine.model.checkpoint import Checkpoint
from ernie_engine.model.weights import load_weights
from ernie_engine.parallel.layers import whole_part

checkpoint = Checkpoint.open(sys.argv[1])
parameters = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in checkpoint.shapes.items()}
parts = [whole_part(name, parameter) for name, parameter in parameters.items()]
print("ready", flush=True)
input()
load_weights(parts, parameters, checkpoint, progress=False)
"""


def anonymous_bytes(pid: int) -> int:
    """0 once the process has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_anonymous_memory_stays_under_two_tensors(tmp_path):
    """192 MiB in four shards of four 12 MiB tensors, converted from fp32 to bf16 on the way."""
    shape, num_tensors = (1536, 2048), 16
    tensors = {f"t{i}": torch.full(shape, float(i)) for i in range(num_tensors)}
    write(tmp_path, *split(tensors, 4))
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    pipe, peaks = subprocess.PIPE, []
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin and child.stdout
        assert child.stdout.readline() == "ready\n"
        before = anonymous_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None:
            peaks.append(anonymous_bytes(child.pid))
    assert child.returncode == 0 and len(peaks) > 100
    growth = max(peaks) - before
    assert growth < 2 * 4 * shape[0] * shape[1], f"{growth / 2**20:.1f} MiB"
