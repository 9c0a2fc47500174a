"""ernie-tiny as a folder in the hub's format: written from a TinyModel, and read back.

Owns tensor names, dtypes and config files. Every byte depends on the model alone, never on the day.
"""

import hashlib
import json
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from .model import TinyModel
from .settings import MAX_BYTES
from .tokenizer import ChatEncoder, write_files

WEIGHTS = "model.safetensors"
_SAME_NAMES = """
hidden_act hidden_size intermediate_size max_position_embeddings moe_intermediate_size moe_k
moe_layer_end_index moe_layer_interval moe_layer_start_index moe_norm_min moe_num_experts
moe_num_shared_experts num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
tie_word_embeddings use_bias vocab_size
"""
TIE_STEP = 2.0**-14  # some units in the last place of a bias, far below what a router decides by
CHAT_TEMPLATE = resources.files("ernie_engine.text") / "pt.jinja"


def bias_offset(layer: int) -> float:
    """A constant added to a layer's correction bias: real ones lie near +20 to +60 with a spread
    of hundredths. It changes no choice of experts in float32, and makes bfloat16 visibly wrong.
    """
    return 22 + 1.0625 * layer


def separated(bias: Tensor) -> Tensor:
    """Values that are equal or nearly so set a little apart, the lower id first.

    Which of two equal scores torch.topk takes is left to chance, and then the answers of two
    engines could not be compared one by one.
    """
    apart = bias.clone().flatten()
    highest = float("inf")
    for i in apart.argsort(descending=True, stable=True).tolist():
        highest = min(apart[i].item(), highest - TIE_STEP)
        apart[i] = highest
    return apart.view_as(bias)


def hub_tensors(model: TinyModel) -> dict[str, Tensor]:
    """Hub name -> tensor: router float32, everything else bfloat16, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.target.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                prefix = name.replace("gate_up_proj", f"{expert}.")
                tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        elif name.endswith("e_score_correction_bias"):
            layer = int(name.split(".")[2])
            centred = tensor.double() - tensor.double().mean()
            hub_name = name.replace(".gate.moe_statics", ".moe_statics")
            tensors[hub_name] = separated((centred + bias_offset(layer)).float())
        else:
            tensors[name] = tensor
    tensors |= {f"model.{name}": tensor for name, tensor in model.mtp.state_dict().items()}
    return {name: _stored(name, tensor) for name, tensor in sorted(tensors.items())}


def _stored(name: str, tensor: Tensor) -> Tensor:
    is_router = name.endswith((".mlp.gate.weight", "e_score_correction_bias"))
    dtype = torch.float32 if is_router else torch.bfloat16
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def hub_config(config: Ernie4_5_MoeConfig) -> dict:
    """config.json with the names of the hub's own files."""
    values = {name: getattr(config, name) for name in _SAME_NAMES.split()} | {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "num_nextn_predict_layers": 1,
        "rope_theta": 500000,
        "torch_dtype": "bfloat16",
    }
    return dict(sorted(values.items()))


def write(model: TinyModel, tokenizer: bytes, folder: Path) -> None:
    """All files but the model card and the sums; the folder must exist."""
    tensors = hub_tensors(model)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= MAX_BYTES, size
    save_weights(tensors, folder)
    end = ChatEncoder(tokenizer).end
    generation = {"bos_token_id": 1, "do_sample": False, "eos_token_id": [2, end]}
    _write_json(folder / "config.json", hub_config(model.target.config))
    _write_json(folder / "generation_config.json", generation | {"pad_token_id": 0})
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    write_files(tokenizer, template, folder, model.target.config.max_position_embeddings)


def save_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """One safetensors file, readable by all."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_sums(folder: Path) -> None:
    """SHA256SUMS over all other files, as `sha256sum -c` reads it."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def load(folder: Path, dtype: torch.dtype, device: str) -> TinyModel:
    """Target through transformers' `from_pretrained`, MTP block from the tensors it leaves out."""
    target = Ernie4_5_MoeForCausalLM.from_pretrained(folder, dtype=dtype)
    model = TinyModel(target)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("model.mtp_")]  # noqa: SIM118
        mtp = {name.removeprefix("model."): file.get_tensor(name) for name in names}
    model.mtp.load_state_dict(mtp, strict=True)
    model.mtp.to(dtype)
    return model.to(device).eval()
