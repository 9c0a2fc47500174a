"""How to serve a model: EngineConfig, the keywords of Engine() and the flags of the scripts.

Owns every check of their values, and what "auto" and None mean, resolved once against the model.
Never imports torch; a config is never written after it was made.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, fields

from ernie_engine.config import ModelConfig
from ernie_engine.options import option

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
KERNELS_HELP = (
    "implementations of the ops: torch, triton, or such as triton,-linear (that op in torch); "
    "auto: what the environment variable ERNIE_KERNELS says, which any other value overrules"
)
BUDGET_HELP = (
    "a step's tokens; None: 8192, with which none of 32 running requests waited longer than 0.25 s "
    "for a token while a prompt of 32,000 came in (21B-A3B, H200; 2048: 0.1 s, docs/performance.md)"
)
CACHE_HELP = (
    "of one rank; None: what is left of the GPU's memory, on a CPU 4 GiB; if it is given, leave "
    "room for CUDA graphs yourself"
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Field names are those that users of vLLM know. ValueError on a bad value, naming the field.

    None and "auto" are settled by resolve(), which the engine calls once.
    """

    model: str = option(dataclasses.MISSING, "the checkpoint's folder")
    dtype: str = option("auto", "of weights and activations; auto: the checkpoint's")
    device: str = option("auto", "cpu, cuda (the first) or cuda:N; auto: a GPU if there is one")
    load_format: str = option("auto", "auto: safetensors; dummy: random weights, for speed only")
    kernels: str = option("auto", KERNELS_HELP)
    enforce_eager: bool = option(False, "no CUDA graphs: kernels are launched one by one")
    log_kernels: bool = option(False, "count each op's calls and print them at the end")
    max_model_len: int | None = option(None, "prompt and answer; None: the model's")
    max_num_seqs: int = option(256, "requests running at once")
    max_num_batched_tokens: int | None = option(None, BUDGET_HELP)
    block_size: int = option(16, "tokens in a K/V block")
    gpu_memory_utilization: float = option(0.9, "share of the card's memory for everything")
    kv_cache_memory_bytes: int | None = option(None, CACHE_HELP)
    enable_prefix_caching: bool = option(True, "prompts share the blocks of equal beginnings")
    enable_chunked_prefill: bool = option(True, "a long prompt is read in several steps")
    max_steps_in_flight: int | None = option(None, "None: one a stage, one more on a GPU")
    max_logprobs: int = option(20, "the most alternatives that a request may ask for")
    tensor_parallel_size: int | None = option(None, "None: 1; under torchrun, what fits a host")
    pipeline_parallel_size: int | None = option(None, "None: 1; under torchrun, the other ranks")
    enable_expert_parallel: bool = option(False, "deal experts out whole, do not cut each")
    distributed_timeout_seconds: int = option(600, "of a collective, and of the ranks' meeting")
    peer_timeout_seconds: float = option(10.0, "silence, or a step that stands still: a lost rank")
    control_port: int | None = option(None, "of rank 0, for plans and results; None: a free one")
    debug: bool = option(False, "every rank checks every plan's digest and every step's tokens")

    def __post_init__(self) -> None:
        _check_one_of("dtype", self.dtype, DTYPES)
        _check_one_of("load_format", self.load_format, LOAD_FORMATS)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f'device={self.device!r}: use "auto", "cpu", "cuda" or "cuda:N"')
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name}={value!r}: must be True or False")
            if field.type in (int, int | None) and field.name != "max_logprobs":
                _check_positive(field.name, value, optional=field.type is not int)
        if type(self.max_logprobs) is not int or self.max_logprobs < 0:
            raise ValueError(f"max_logprobs={self.max_logprobs!r}: must be an integer, 0 or more")
        seconds = self.peer_timeout_seconds
        if type(seconds) not in (int, float) or not 2 <= seconds <= 3600:
            raise ValueError(f"peer_timeout_seconds={seconds!r}: must be from 2 to 3600")
        share = self.gpu_memory_utilization
        if type(share) not in (int, float) or not (math.isfinite(share) and 0 < share <= 1):
            raise ValueError(f"gpu_memory_utilization={share!r}: must be above 0 and at most 1")

    def resolve(
        self, model: ModelConfig, cuda: bool, *, tp: int = 1, pp: int = 1, local_rank: int = 0
    ) -> "ResolvedConfig":
        """Settle every None and "auto" for a model, on a machine with or without a GPU, for the
        `local_rank`-th process of its host in a grid of tp x pp ranks."""
        mine = f"cuda:{local_rank}"
        names = {"auto": mine if cuda else "cpu", "cuda": mine}
        device = names.get(self.device, self.device)
        on_gpu = device.startswith("cuda")
        if tp * pp > 1 and re.fullmatch(r"cuda:\d+", self.device):
            raise ValueError(
                f"device={self.device!r}: each of {tp * pp} ranks takes the GPU of its local rank; "
                "use device='cuda', and CUDA_VISIBLE_DEVICES to choose among them"
            )
        if on_gpu and not cuda:
            raise ValueError(f"device={device!r}: torch sees no CUDA device here; use device='cpu'")
        if on_gpu and self.block_size & (self.block_size - 1):
            raise ValueError(
                f"block_size={self.block_size}: on a GPU it must be a power of two, such as 16"
            )
        longest = model.max_position_embeddings
        max_model_len = longest if self.max_model_len is None else self.max_model_len
        if not 2 <= max_model_len <= longest:
            raise ValueError(
                f"max_model_len={max_model_len}: must be from 2 to the model's {longest} positions"
            )
        chunked = self.enable_chunked_prefill
        budget = self.max_num_batched_tokens or (8192 if chunked else max(8192, max_model_len))
        if not chunked and budget < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={budget} is below max_model_len={max_model_len}: "
                "a whole prompt must fit a step unless enable_chunked_prefill is on"
            )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {
            "device": device,
            "dtype": model.dtype if self.dtype == "auto" else self.dtype,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": budget,
            # One a stage, so that all have work; on a GPU one more, planned while they run.
            "max_steps_in_flight": self.max_steps_in_flight or pp + on_gpu,
            "tensor_parallel_size": tp,
            "pipeline_parallel_size": pp,
        }
        return ResolvedConfig(**values)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which nothing is open but kv_cache_memory_bytes, which is measured."""

    max_model_len: int  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    max_num_batched_tokens: int  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    max_steps_in_flight: int  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    tensor_parallel_size: int  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    pipeline_parallel_size: int  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]


def _check_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")


def _check_positive(name: str, value: object, optional: bool) -> None:
    if value is None and optional:
        return
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer")
