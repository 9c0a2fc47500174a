"""Which implementation of each op runs: the table of all there are, and the choice among them.

A choice is made once and handed on as an `Ops`. Never changes it later, and never replaces an
implementation that was asked for by another: what does not exist is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ernie_engine.kernels import (
    decode_attention,
    embedding,
    linear,
    logprobs,
    moe,
    penalties,
    prefill_attention,
    rms_norm,
    rope,
    router,
    sampling,
    swiglu,
    vocab_head,
)


@dataclass(frozen=True)
class Ops:
    """One chosen implementation an op. Arguments, shapes and maths: the op's own file."""

    embedding: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_and_cache: Callable[..., Tensor]
    prefill_attention: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    router: Callable[..., tuple[Tensor, Tensor]]
    moe_experts: Callable[..., Tensor]
    vocab_head: Callable[..., Tensor]
    token_counts: Callable[..., Tensor]
    apply_penalties: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    token_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


# op -> implementation -> function
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    **embedding.IMPLEMENTATIONS,
    **linear.IMPLEMENTATIONS,
    **rms_norm.IMPLEMENTATIONS,
    **rope.IMPLEMENTATIONS,
    **prefill_attention.IMPLEMENTATIONS,
    **decode_attention.IMPLEMENTATIONS,
    **swiglu.IMPLEMENTATIONS,
    **router.IMPLEMENTATIONS,
    **moe.IMPLEMENTATIONS,
    **vocab_head.IMPLEMENTATIONS,
    **penalties.IMPLEMENTATIONS,
    **sampling.IMPLEMENTATIONS,
    **logprobs.IMPLEMENTATIONS,
}

AUTO = {"cpu": "torch", "cuda": "torch"}  # device type -> the implementation "auto" stands for


def select(kernels: str, device_type: str) -> Ops:
    """The ops that `kernels` names ("auto" or an implementation) for "cpu" or "cuda".

    Raises ValueError for a name that does not exist.
    """
    if device_type not in AUTO:
        raise ValueError(f"device={device_type!r}: use one of {sorted(AUTO)}")
    name = AUTO[device_type] if kernels == "auto" else kernels
    known = {name for implementations in IMPLEMENTATIONS.values() for name in implementations}
    if name not in known:
        raise ValueError(f"kernels={kernels!r}: use one of {['auto', *sorted(known)]}")
    return Ops(**{op: implementations[name] for op, implementations in IMPLEMENTATIONS.items()})
