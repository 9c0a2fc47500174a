"""What is written is what transformers, and a reader of the hub's format, expects."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ernie_engine.testing.checkpoints import CheckpointSpec, random_tensors, write_checkpoint
from ernie_engine.testing.tokenizers import project_text
from ernie_engine.text.templates import built_in_template, load_chat_template
from ernie_engine.text.tokenizer import load_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_checkpoint.py"
TINY = CheckpointSpec(
    hidden_size=48,
    num_layers=3,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_experts=5,
    vocab_size=301,
    dtype="float32",
    tokenizer=False,
)
DENSE = replace(TINY, num_experts=0, head_dim=32)  # query width 128, hidden 48


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        DENSE,
        replace(DENSE, head_dim=None, tie_embeddings=False),
        replace(TINY, num_kv_heads=1, tie_embeddings=False, shards=3),
        replace(TINY, num_shared_experts=0, top_k=5, first_moe_layer=0),
        replace(TINY, num_shared_experts=2, omit_shared_field=True, moe_layer_interval=2),
        replace(TINY, transformers5_names=True, last_moe_layer=1, mtp=True),
        replace(TINY, last_moe_layer=-1, head_dim=16, dtype="bfloat16"),
        replace(DENSE, transformers5_names=True, dtype="float16"),
    ],
)
def test_transformers_reads_it(tmp_path: Path, spec: CheckpointSpec):
    write_checkpoint(tmp_path, spec)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == getattr(torch, spec.dtype)
    assert model.config.rope_parameters["rope_theta"] == 500000
    assert model.config.tie_word_embeddings is spec.tie_embeddings
    theirs = {name for name, _ in model.named_parameters()}
    ours = random_tensors(spec)
    assert ("lm_head.weight" in ours) is not spec.tie_embeddings
    fused = {name for name in theirs if ".experts." in name or name.endswith("_bias")}
    assert theirs - fused <= set(ours)
    for name in theirs - fused:
        assert torch.equal(model.get_parameter(name), ours[name]), name


def test_names_shapes_and_dtypes_of_the_hub(tmp_path: Path):
    write_checkpoint(tmp_path, replace(TINY, dtype="bfloat16", mtp=True, num_shared_experts=2))
    tensors = stored(tmp_path)
    moe = "model.layers.1.mlp"
    shapes = {
        "model.embed_tokens.weight": (301, 48),
        "model.norm.weight": (48,),
        "model.layers.0.mlp.gate_proj.weight": (80, 48),
        "model.layers.2.self_attn.k_proj.weight": (24, 48),
        f"{moe}.gate.weight": (5, 48),
        f"{moe}.moe_statics.e_score_correction_bias": (1, 5),
        f"{moe}.experts.4.down_proj.weight": (48, 24),
        f"{moe}.shared_experts.up_proj.weight": (48, 48),
        "model.mtp_block.0.mlp.down_proj.weight": (48, 80),
        "model.mtp_block.0.self_attn.q_proj.weight": (48, 48),
        "model.mtp_linear_proj.0.weight": (48, 96),
        "model.mtp_emb_norm.0.weight": (48,),
        "model.mtp_hidden_norm.0.weight": (48,),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    assert "lm_head.weight" not in tensors
    assert sum("mtp" in name for name in tensors) == 12
    float32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    router = ("gate.weight", "moe_statics.e_score_correction_bias")
    assert float32 == {f"model.layers.{layer}.mlp.{end}" for layer in (1, 2) for end in router}
    assert all(t.dtype == torch.bfloat16 for name, t in tensors.items() if name not in float32)


def test_config_of_the_hub(tmp_path: Path):
    def config(spec: CheckpointSpec) -> dict:
        folder = tmp_path / str(hash(spec))
        return json.loads((write_checkpoint(folder, spec) / "config.json").read_text())

    moe = config(TINY)
    assert moe["model_type"] == "ernie4_5_moe" and moe["torch_dtype"] == "float32"
    assert moe["rope_theta"] == 500000 and moe["rope_scaling"] is None
    assert moe["moe_num_shared_experts"] == 1
    assert not {"head_dim", "moe_layer_end_index", "num_nextn_predict_layers"} & set(moe)
    dense = config(DENSE)
    assert dense["model_type"] == "ernie4_5" and dense["head_dim"] == 32
    assert not any(key.startswith("moe") for key in dense)
    assert "moe_num_shared_experts" not in config(replace(TINY, omit_shared_field=True))
    assert config(replace(TINY, mtp=True))["num_nextn_predict_layers"] == 1
    newer = config(replace(TINY, transformers5_names=True))
    assert newer["dtype"] == "float32" and newer["rope_parameters"]["rope_theta"] == 500000.0
    assert not {"torch_dtype", "rope_theta", "rope_scaling"} & set(newer)


def test_shards_hold_everything_once(tmp_path: Path):
    write_checkpoint(tmp_path, replace(TINY, shards=4))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    tensors = random_tensors(TINY)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        with safe_open(tmp_path / file, "pt") as shard:
            names = set(shard.keys())
        assert names == {name for name, place in index["weight_map"].items() if place == file}


def test_values_follow_the_seed_and_the_options():
    first, again = random_tensors(TINY), random_tensors(TINY)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = random_tensors(replace(TINY, seed=1))
    assert not any(torch.equal(first[name], other[name]) for name in first)
    spec = replace(TINY, router_bias_mean=20.0, router_bias_spread=0.02, num_experts=64)
    bias = random_tensors(spec)["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert abs(bias.mean() - 20) < 0.02 and 0.01 < bias.std() < 0.03
    flat = random_tensors(replace(TINY, weight_std=0.05))["model.layers.0.self_attn.q_proj.weight"]
    assert 0.045 < flat.std() < 0.055


@pytest.mark.parametrize("spec", [CheckpointSpec(), CheckpointSpec(num_experts=0)])
def test_greedy_choices_are_clear(tmp_path: Path, spec: CheckpointSpec):
    """Logits are peaked, and the answer does not just repeat the last token."""
    write_checkpoint(tmp_path, replace(spec, dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(100, 110)[None]
    with torch.no_grad():
        ids = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
        logits = model(ids).logits[0, 9:-1]
    best = logits.topk(2).values
    assert 2 < logits.std() < 3
    assert (best[:, 0] - best[:, 1]).min() > 5e-4
    assert len(set(ids[0, 10:].tolist())) > 5


@pytest.mark.parametrize("thinking", [False, True])
def test_the_tokenizer_fits_the_model(tmp_path: Path, thinking: bool):
    write_checkpoint(tmp_path, replace(TINY, tokenizer=True, vocab_size=601, thinking=thinking))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and 550 < tokenizer.vocab_size < 601  # padded, as on the hub
    source = built_in_template("thinking" if thinking else "pt")
    assert load_chat_template(tmp_path, tokenizer).source == source
    assert (tokenizer.token_id("<think>") is not None) is thinking
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert ("do_sample" in generation) is not thinking
    assert generation["temperature"] == (0.6 if thinking else 0.8)


def test_the_corpus_is_the_projects_own_text():
    assert "Owns the list of its special tokens. Never downloads a text." in project_text()


def test_a_vocabulary_too_small_for_a_tokenizer(tmp_path: Path):
    with pytest.raises(ValueError, match="vocab_size: cannot train a tokenizer"):
        write_checkpoint(tmp_path, replace(TINY, tokenizer=True))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple"),
        ({"hidden_size": 50}, "hidden_size must be a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"top_k": 6}, "top_k must be between 1 and num_experts"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"dtype": "int8"}, "dtype must be float32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script(tmp_path: Path):
    folder = tmp_path / "new" / "checkpoint"
    sizes = ["--hidden-size", 32, "--num-layers", 2, "--num-experts", 0, "--head-dim", 8]
    rest = ["--no-tokenizer", "--no-tie-embeddings", "--dtype", "float32", "--seed", 3]
    done = run(folder, "--vocab-size", 99, *sizes, *rest)
    assert done.returncode == 0 and str(folder) in done.stdout
    expected = random_tensors(
        CheckpointSpec(
            hidden_size=32,
            num_layers=2,
            num_experts=0,
            head_dim=8,
            vocab_size=99,
            tie_embeddings=False,
            dtype="float32",
            seed=3,
        )
    )
    tensors = stored(folder)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    again = run(folder)
    assert again.returncode == 2 and "is there already" in again.stderr
