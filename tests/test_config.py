"""ModelConfig: the released files, both spellings of them, and a clear error for all else."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
from transformers import Ernie4_5_MoeConfig, Ernie4_5Config

from ernie_engine.config import ModelConfig

COMMON = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "vocab_size": 103424,
}
DENSE = COMMON | {
    "architectures": ["Ernie4_5ForCausalLM"],
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "model_type": "ernie4_5",
    "num_attention_heads": 16,
    "num_hidden_layers": 18,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_cache": True,
}
MOE = COMMON | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "model_type": "ernie4_5_moe",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
}
THINKING = {k: v for k, v in MOE.items() if k not in ("moe_layer_end_index",)} | {
    "_attn_implementation": "eager",
    "moe_capacity": [64, 64, 64],
    "moe_gate": "top2_fused",
    "moe_use_aux_free": True,
    "num_nextn_predict_layers": None,
    "use_cache": True,
}
BIG = MOE | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "moe_intermediate_size": 3584,
    "moe_k": 8,
    "moe_layer_end_index": 53,
    "moe_layer_start_index": 3,
    "moe_num_shared_experts": 0,
    "num_attention_heads": 64,
    "num_hidden_layers": 54,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def without(raw: dict, *names: str) -> dict:
    return {key: value for key, value in raw.items() if key not in names}


def count_parameters(c: ModelConfig) -> int:
    """All parameters but MTP's, from the geometry alone."""
    h, expert = c.hidden_size, 3 * c.hidden_size * c.moe_intermediate_size
    attention = 2 * h * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    moe = c.moe_num_experts * (expert + h + 1) + c.moe_num_shared_experts * expert
    dense = 3 * h * c.intermediate_size
    ffn = sum(moe if c.is_moe_layer(i) else dense for i in range(c.num_hidden_layers))
    tables = (1 if c.tie_word_embeddings else 2) * c.vocab_size * h
    return tables + c.num_hidden_layers * (attention + 2 * h) + ffn + h


@pytest.mark.parametrize(
    ("raw", "total", "moe_layers", "mtp"),
    [
        (DENSE, 360_748_032, 0, 0),
        (MOE, 21_825_437_888, 27, 1),
        (THINKING, 21_825_437_888, 27, 0),
        (BIG, 299_484_163_264, 51, 1),
    ],
    ids=["0.3b", "21b", "21b-thinking", "300b"],
)
def test_released_geometries(raw, total, moe_layers, mtp, caplog):
    config = ModelConfig.from_dict(raw)
    assert count_parameters(config) == total
    assert sum(map(config.is_moe_layer, range(config.num_hidden_layers))) == moe_layers
    assert (config.head_dim, config.num_nextn_predict_layers) == (128, mtp)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 0)
    assert (config.rope_theta, config.rms_norm_eps, config.moe_norm_min) == (5e5, 1e-5, 1e-12)
    assert config.dtype == "bfloat16"
    assert not caplog.records


def test_thinking_reads_as_its_plain_sibling():
    plain = ModelConfig.from_dict(MOE)
    assert ModelConfig.from_dict(THINKING) == replace(plain, num_nextn_predict_layers=0)


def test_transformers_5_names_mean_the_same(tmp_path):
    dense = Ernie4_5Config(dtype="bfloat16")
    moe = Ernie4_5_MoeConfig(dtype="bfloat16")
    for theirs, ours in ((dense, DENSE), (moe, without(MOE, "num_nextn_predict_layers"))):
        expected = ModelConfig.from_dict(ours)
        assert ModelConfig.from_dict(theirs.to_dict()) == expected
        theirs.save_pretrained(tmp_path)
        assert ModelConfig.from_folder(tmp_path) == expected


def test_their_whole_dict_is_known(caplog):
    ModelConfig.from_dict(Ernie4_5_MoeConfig(dtype="float32").to_dict())
    assert not caplog.records


def test_aliases():
    renamed = without(MOE, "moe_k", "moe_num_experts", "torch_dtype", "rope_theta")
    renamed |= {"num_experts_per_tok": 6, "num_experts": 64, "dtype": "bfloat16"}
    renamed["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert ModelConfig.from_dict(renamed) == ModelConfig.from_dict(MOE)
    assert ModelConfig.from_dict(MOE | renamed) == ModelConfig.from_dict(MOE)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("dtype", "float16"),
        ("num_experts", 32),
        ("num_experts_per_tok", 2),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_two_names_that_disagree(field, other):
    with pytest.raises(ValueError, match="keep one"):
        ModelConfig.from_dict(MOE | {field: other})


def test_eos_may_be_a_list():
    assert ModelConfig.from_dict(DENSE | {"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)


@pytest.mark.parametrize("end", [None, -1, 27])
def test_moe_end_index(end):
    assert ModelConfig.from_dict(MOE | {"moe_layer_end_index": end}).moe_layer_end_index == 27


def test_moe_layers_by_interval():
    raw = MOE | {"num_hidden_layers": 9, "moe_layer_start_index": 3, "moe_layer_interval": 2}
    config = ModelConfig.from_dict(raw | {"moe_layer_end_index": 6})
    assert [i for i in range(9) if config.is_moe_layer(i)] == [3, 5]


def test_head_dim_field_wins_over_the_quotient():
    assert ModelConfig.from_dict(MOE | {"head_dim": 64}).head_dim == 64
    assert ModelConfig.from_dict(without(DENSE, "head_dim")).head_dim == 64


def shared(width: int, layer: int = 1) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.mlp.shared_experts.gate_proj.weight": (width, 2560)}


@pytest.mark.parametrize(
    ("shapes", "count"), [(None, 0), ({}, 0), (shared(1536), 1), (shared(3072), 2)]
)
def test_absent_shared_experts_are_told_by_the_tensors(shapes, count):
    raw = without(MOE, "moe_num_shared_experts")
    assert ModelConfig.from_dict(raw, shapes).moe_num_shared_experts == count


@pytest.mark.parametrize("shapes", [shared(1537), shared(1536) | shared(3072, layer=2)])
def test_shared_experts_that_cannot_be_told(shapes):
    with pytest.raises(ValueError, match=r"moe_num_shared_experts.*add it"):
        ModelConfig.from_dict(without(MOE, "moe_num_shared_experts"), shapes)


def test_given_shared_experts_win_over_the_tensors():
    assert ModelConfig.from_dict(MOE, shared(1536)).moe_num_shared_experts == 2
    assert ModelConfig.from_dict(BIG, shared(3584)).moe_num_shared_experts == 0


def test_absent_tie_is_told_by_the_tensors():
    raw, head = without(DENSE, "tie_word_embeddings"), {"lm_head.weight": (103424, 1024)}
    assert ModelConfig.from_dict(raw).tie_word_embeddings is True
    assert ModelConfig.from_dict(raw, {}).tie_word_embeddings is True
    assert ModelConfig.from_dict(raw, head).tie_word_embeddings is False
    assert ModelConfig.from_dict(DENSE, head).tie_word_embeddings is True


UNSUPPORTED = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0},
    "rope_type": "linear",
    "hidden_act": "gelu",
    "use_bias": True,
    "attention_bias": True,
    "use_rmsnorm": False,
    "compression_ratio": 2.0,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "fp8"},
    "sliding_window": 4096,
    "moe_gate_act": "sigmoid",
    "routed_scaling_factor": 2.5,
}
BAD_VALUES = [
    ("model_type", "ernie4_5_vl_moe"),
    ("model_type", "llama"),
    ("model_type", ["ernie4_5_moe"]),
    ("moe_intermediate_size", [1536, 512]),
    ("moe_num_experts", 0),
    ("moe_num_experts", [64, 64]),
    ("moe_k", 0),
    ("moe_k", 65),
    ("moe_num_shared_experts", -1),
    ("moe_layer_start_index", -1),
    ("moe_layer_end_index", -2),
    ("moe_layer_interval", 0),
    ("moe_norm_min", 0.0),
    ("num_nextn_predict_layers", -1),
    ("vocab_size", 0),
    ("vocab_size", "103424"),
    ("hidden_size", -2560),
    ("hidden_size", 2560.0),
    ("hidden_size", 2561),
    ("num_hidden_layers", True),
    ("num_hidden_layers", 0),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("intermediate_size", 1.5),
    ("max_position_embeddings", -1),
    ("head_dim", 127),
    ("rms_norm_eps", math.nan),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-5),
    ("rope_theta", -(10**400)),
    ("rope_theta", math.inf),
    ("rope_theta", True),
    ("torch_dtype", "float8_e4m3fn"),
    ("torch_dtype", 16),
    ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", 1),
    ("bos_token_id", -1),
    ("bos_token_id", 103424),
    ("pad_token_id", 2.0),
    ("eos_token_id", [2, 103424]),
    ("eos_token_id", []),
    ("eos_token_id", "</s>"),
]


@pytest.mark.parametrize(("field", "value"), [*UNSUPPORTED.items(), *BAD_VALUES], ids=str)
def test_bad_values_are_named(field, value):
    shown = {"torch_dtype": "dtype", "eos_token_id": "eos_token_ids"}.get(field, field)
    with pytest.raises(ValueError, match=f"^{shown}=") as caught:
        ModelConfig.from_dict(MOE | {field: value})
    assert len(str(caught.value).split(": ", 1)[1]) > 10  # a remedy follows


def test_harmless_spellings_of_the_supported_values():
    raw = MOE | {"compression_ratio": 1.0, "rope_scaling": None, "sliding_window": None}
    raw |= {"moe_gate_act": "softmax", "quantization_config": None, "use_rmsnorm": True}
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(MOE)


def test_query_heads_must_share_kv_heads_evenly():
    with pytest.raises(ValueError, match=r"num_attention_heads=20.*num_key_value_heads=3"):
        ModelConfig.from_dict(MOE | {"num_key_value_heads": 3})


def test_dense_model_with_experts():
    with pytest.raises(ValueError, match="moe_num_experts=64"):
        ModelConfig.from_dict(DENSE | {"moe_num_experts": 64})
    assert ModelConfig.from_dict(DENSE | {"moe_num_experts": 0}) == ModelConfig.from_dict(DENSE)


def test_all_missing_fields_are_named():
    raw = without(MOE, "hidden_size", "rope_theta", "torch_dtype", "moe_k", "eos_token_id")
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict(raw | {"vocab_size": None})
    for name in ("hidden_size", "rope_theta", "dtype", "moe_k", "eos_token_id", "vocab_size"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="model_type"):
        ModelConfig.from_dict({})


def test_unknown_fields_are_one_log_line(caplog):
    raw = MOE | {"shiny": 1, "moe_capacity": [1], "hidden_dropout_prob": 0.1, "odd_knob": "x"}
    with caplog.at_level(logging.WARNING):
        assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(MOE)
    assert len(caplog.records) == 1
    assert "shiny, odd_knob" in caplog.text
    assert "moe_capacity" not in caplog.text and "hidden_dropout_prob" not in caplog.text


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ModelConfig.from_dict(DENSE).vocab_size = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"vocab_size": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"", "not valid JSON"),
        (json.dumps(MOE | {"moe_k": 0}).encode(), "moe_k=0"),
        (b'{"model_type": "gpt2"}', "model_type='gpt2'"),
    ],
)
def test_errors_name_the_file(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path / "nowhere")


def test_nan_in_the_file(tmp_path):
    text = json.dumps(MOE | {"rms_norm_eps": math.nan})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="rms_norm_eps=nan"):
        ModelConfig.from_folder(tmp_path)


def test_import_brings_no_torch():
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('c', sys.argv[1])\n"
    code += "m = u.module_from_spec(s); sys.modules['c'] = m; s.loader.exec_module(m)\n"
    code += "assert 'torch' not in sys.modules"
    file = sys.modules[ModelConfig.__module__].__file__
    assert file is not None
    subprocess.run([sys.executable, "-c", code, file], check=True)
