"""The written folder: hub names and dtypes, read back by transformers and by the engine."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import checkpoint, run
from tiny.checking import Findings, questions
from tiny.faults import FAULTS, plant
from tiny.model import TinyModel, make_config
from tiny.settings import MAX_BYTES, Settings
from tiny.tasks import THRESHOLDS
from tiny.tokenizer import ChatEncoder
from torch import Tensor
from transformers import Ernie4_5_MoeForCausalLM, GenerationConfig

from ernie_engine.config import ModelConfig
from ernie_engine.evals.report import Score

FILES = (
    "README.md SHA256SUMS chat_template.jinja config.json generation_config.json model.safetensors "
    "special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json"
)
MTP_NAMES = {
    *(f"model.mtp_{name}.0.weight" for name in ("emb_norm", "hidden_norm", "linear_proj")),
    *(f"model.mtp_block.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"model.mtp_block.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"model.mtp_block.0.{name}_layernorm.weight" for name in ("input", "post_attention")),
}


REAL = Path(__file__).parents[2] / "models" / "ernie-tiny"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def is_router(name: str) -> bool:
    return name.endswith(("mlp.gate.weight", "moe_statics.e_score_correction_bias"))


def test_the_folder_is_whole(smoke: Settings):
    assert sorted(path.name for path in smoke.out.iterdir()) == FILES.split()
    lines = (smoke.out / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert sums.keys() == set(FILES.split()) - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((smoke.out / name).read_bytes()).hexdigest() == digest
    assert list(smoke.out.parent.iterdir()) == [smoke.out]  # nothing temporary is left


def test_hub_names_and_dtypes(smoke: Settings):
    tensors = tensors_of(smoke.out)
    assert {name for name in tensors if "mtp" in name} == MTP_NAMES
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.1.mlp.moe_statics.e_score_correction_bias"].shape == (1, 4)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if is_router(name) else torch.bfloat16), name


def test_the_engine_reads_the_config(smoke: Settings):
    config = ModelConfig.from_folder(smoke.out)
    assert (config.model_type, config.hidden_size, config.rope_theta) == ("ernie4_5_moe", 64, 5e5)
    assert (config.moe_num_experts, config.moe_k, config.moe_num_shared_experts) == (4, 2, 1)
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]
    assert (config.num_nextn_predict_layers, config.tie_word_embeddings) == (1, True)
    raw = json.loads((smoke.out / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16" and "rope_parameters" not in raw


def test_generation_stops_at_the_end_of_a_turn(smoke: Settings):
    encoder = ChatEncoder((smoke.out / "tokenizer.model").read_bytes())
    assert GenerationConfig.from_pretrained(smoke.out).eos_token_id == [2, encoder.end]


def test_what_is_written_is_what_was_trained(pieces: bytes, tmp_path: Path, smoke: Settings):
    """transformers gives the trained model's logits from the folder, bit for bit; so does MTP."""
    model = TinyModel.fresh(make_config(smoke, 2048), 3, torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    for router in model.routers():
        router.weight.data.normal_(generator=generator)
        bias = router.moe_statics.e_score_correction_bias
        bias.data = 0.05 * torch.randn(bias.shape, generator=generator)
    checkpoint.write(model, pieces, tmp_path)
    loaded = checkpoint.load(tmp_path, torch.bfloat16, "cpu")
    loaded.target.config._experts_implementation = model.target.config._experts_implementation
    tokens = torch.randint(5, 2048, (2, 50), generator=generator)
    positions = torch.arange(50).expand(2, -1)
    mask = torch.full((50, 50), float("-inf"), dtype=torch.bfloat16).triu(1).expand(2, 1, -1, -1)
    with torch.no_grad():
        for ours, theirs in zip(
            model(tokens, positions, mask), loaded(tokens, positions, mask), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_biases_stand_apart_so_that_no_two_scores_are_equal_by_them():
    bias = torch.tensor([[27.5, 27.25, 27.5, 27.5, 27.0, 27.25 + 2.0**-19]])
    apart = checkpoint.separated(bias).flatten()
    assert (apart.sort().values.diff() >= checkpoint.TIE_STEP).all()
    assert apart.tolist()[0] == 27.5 and (bias.flatten() - apart <= 2 * checkpoint.TIE_STEP).all()
    assert apart[0] > apart[2] > apart[3] > apart[5] > apart[1] > apart[4]  # the lower id first


def test_the_stored_biases_stand_apart():
    for name, bias in tensors_of(REAL).items():
        if name.endswith("e_score_correction_bias"):
            assert (bias.flatten().sort().values.diff() >= checkpoint.TIE_STEP / 2).all(), name


def test_the_bias_has_the_size_of_real_ones(smoke: Settings):
    tensors = tensors_of(smoke.out)
    for layer in (1, 2):
        bias = tensors[f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"]
        assert bias.mean().item() == pytest.approx(checkpoint.bias_offset(layer), abs=1e-4)
        assert 0 < bias.std() < 0.5


def test_sizes_of_the_full_model():
    model = TinyModel.fresh(make_config(Settings(), 2048), 0, torch.bfloat16)
    tensors = checkpoint.hub_tensors(model)
    assert sum(tensor.nbytes for tensor in tensors.values()) < MAX_BYTES
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_parameters()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_only_its_tensors(fault: str, smoke: Settings, tmp_path: Path):
    plant(smoke.out, tmp_path / "faulty", fault, smoke.hidden // smoke.heads)
    before, after = tensors_of(smoke.out), tensors_of(tmp_path / "faulty")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    end = {
        "bias_dropped": "e_score_correction_bias",
        "bias_in_bf16": "e_score_correction_bias",
        "rope_neox": ("q_proj.weight", "k_proj.weight"),
        "experts_swapped": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        "experts_silent": "down_proj.weight",
    }[fault]
    assert changed and all(name.endswith(end) for name in changed)
    assert before.keys() == after.keys()
    Ernie4_5_MoeForCausalLM.from_pretrained(tmp_path / "faulty")
    with pytest.raises(FileExistsError):
        plant(smoke.out, tmp_path / "faulty", fault, 16)


def test_neox_fault_gives_the_scores_of_neox_pairs(smoke: Settings, tmp_path: Path):
    dim = smoke.hidden // smoke.heads
    plant(smoke.out, tmp_path / "faulty", "rope_neox", dim)
    prefix = "model.layers.0.self_attn."
    angles = torch.outer(torch.arange(9.0), 5e5 ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, D/2]
    x = torch.randn(9, smoke.hidden, generator=torch.Generator().manual_seed(0))

    def first_head_scores(folder: Path, neox: bool) -> Tensor:
        rotated = []
        for name in ("q_proj.weight", "k_proj.weight"):
            y = (x @ tensors_of(folder)[prefix + name].float().T).unflatten(1, (-1, dim))
            a, b = y.chunk(2, -1) if neox else (y[..., 0::2], y[..., 1::2])
            rotated.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1)[:, 0])
        return rotated[0] @ rotated[1].T

    planted = first_head_scores(tmp_path / "faulty", neox=False)
    torch.testing.assert_close(planted, first_head_scores(smoke.out, neox=True))
    assert (planted - first_head_scores(smoke.out, neox=False)).abs().max() > 1e-3


def test_unknown_fault(smoke: Settings, tmp_path: Path):
    with pytest.raises(ValueError, match="'typo'"):
        plant(smoke.out, tmp_path / "x", "typo", 16)


def test_a_miss_is_not_written(
    smoke: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    low = Score("arithmetic", 2, 1, 0.5, 0.1, 0.9)
    findings = Findings([low], {"answers": 1.0, "all_tokens": 1.0}, {"none": [low]})
    monkeypatch.setattr(run, "check", lambda *args: findings)
    again = replace(smoke, allow_miss=False, steps=1, out=tmp_path / "m" / "x", docs=tmp_path)
    assert run.make(again) == 1
    assert list((tmp_path / "m").iterdir()) == []
    assert "arithmetic" in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["written"] is None


def test_thresholds_decide():
    rows = [Score(task, 10, 10, limit, 0.0, 1.0) for task, limit in THRESHOLDS.items()]
    drafting = {"answers": 0.61, "all_tokens": 0.1}
    assert Findings(rows, drafting, {}).missed() == []
    low = [replace(rows[0], accuracy=0.9), *rows[1:-1]]
    missed = Findings(low, {"answers": 0.59, "all_tokens": 1.0}, {}).missed()
    assert missed == ["arithmetic", "json", "drafting"]


def test_questions_for_the_harness():
    asked = questions(["turns", "json"], 3)
    assert [q.id for q in asked] == ["turns-0", "turns-1", "turns-2", "json-0", "json-1", "json-2"]
    assert [m["role"] for m in asked[0].messages][:3] == ["user", "assistant", "user"]
    assert asked[0].messages[-1]["role"] == "user" and asked[3].scorer == "json"
