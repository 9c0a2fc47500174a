"""Which implementation of each op runs: the table of all there are, and the choice among them.

A choice is made once and handed on as an `Ops`. Never changes it later, and never replaces an
implementation that was asked for by another: what does not exist is an error. A fusion, one launch
for what several ops do, runs where all these run as Triton kernels; else they do, one by one.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

from torch import Tensor
from triton import knobs

from ernie_engine.kernels import (
    decode_attention,
    decode_rows,
    embedding,
    linear,
    logprobs,
    moe,
    norm_moe,
    norm_qkv_rope,
    norm_router,
    norm_swiglu,
    penalties,
    prefill_attention,
    rms_norm,
    rope,
    router,
    sampling,
    swiglu,
    vocab_head,
)
from ernie_engine.kernels.parts import Parts


@dataclass(frozen=True)
class Ops:
    """One chosen implementation an op. Arguments, shapes and maths: the op's own file."""

    decode_rows: Callable[..., decode_rows.DecodeRows]
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
    norm_qkv_rope: Callable[..., tuple[Tensor, Tensor]]
    norm_swiglu: Callable[..., tuple[Tensor, Tensor]]
    norm_router: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    norm_moe: Callable[..., tuple[Tensor, Tensor]]

    def implementations(self) -> dict[str, str]:
        """op -> the name of what runs."""
        return {op: _name_of(op, function) for op, function in self._functions().items()}

    def counted(self) -> "Ops":
        """The same, counting calls. A captured CUDA graph counts once, however often it runs."""
        return replace(self, **{op: Counted(f) for op, f in self._functions().items()})

    def call_table(self) -> str:
        """op, implementation and calls, a line each; of counted() ops."""
        names = self.implementations()
        lines = [
            f"{op:<18} {names[op]:<8} {function.calls:>10}"
            for op, function in self._functions().items()
            if isinstance(function, Counted)
        ]
        return "\n".join([f"{'op':<18} {'runs':<8} {'calls':>10}", *lines])

    def _functions(self) -> dict[str, Callable]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Counted:
    """An op that knows how often it was called."""

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def _name_of(op: str, function: Callable) -> str:
    plain = function.function if isinstance(function, Counted) else function
    known = IMPLEMENTATIONS[op].items()
    return next((name for name, function in known if function is plain), PARTS)


# op -> implementation -> function
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    **decode_rows.IMPLEMENTATIONS,
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
    **norm_qkv_rope.IMPLEMENTATIONS,
    **norm_swiglu.IMPLEMENTATIONS,
    **norm_router.IMPLEMENTATIONS,
    **norm_moe.IMPLEMENTATIONS,
}
# fusion -> how it is put together, of what kind of parts, and which of them; one that is a part
# of another before it
FUSIONS = {
    "norm_qkv_rope": (
        norm_qkv_rope.composed,
        Parts,
        ("rms_norm", "add_rms_norm", "linear", "rope_and_cache"),
    ),
    "norm_swiglu": (norm_swiglu.composed, Parts, ("add_rms_norm", "linear", "swiglu")),
    "norm_router": (norm_router.composed, Parts, ("rms_norm", "add_rms_norm", "router")),
    "norm_moe": (norm_moe.composed, norm_moe.Parts, ("norm_router", "moe_experts")),
}
PARTS = "parts"  # what runs for a fusion whose parts run one by one

# Device type -> the implementation "auto" stands for.
AUTO = {"cpu": "torch", "cuda": "triton"}
VARIABLE = "ERNIE_KERNELS"  # what "auto" means instead, if set
SYNTAX = (
    "NAME for all ops, then -OP for torch instead (a fusion: for its parts) or OP=NAME; "
    "such as 'triton,-linear'"
)


def asked_for(kernels: str) -> str:
    """What the environment asks for where the configuration leaves it open."""
    return (os.environ.get(VARIABLE) or "auto") if kernels == "auto" else kernels


def select(kernels: str, device_type: str) -> Ops:
    """The ops that `kernels` names ("triton,-linear") for "cpu" or "cuda".

    Raises ValueError for what does not exist or cannot run there.
    """
    if device_type not in AUTO:
        raise ValueError(f"device={device_type!r}: use one of {sorted(AUTO)}")
    try:
        chosen = _parse(kernels, AUTO[device_type])
        _check_runnable(chosen, device_type)
        return _assemble(chosen)
    except ValueError as error:
        raise ValueError(f"kernels={kernels!r} (or {VARIABLE}): {error}") from None


def _parse(kernels: str, auto: str) -> dict[str, str]:
    """Words like those of "triton,-linear" -> op -> implementation."""
    first, *exceptions = (part.strip() for part in kernels.split(","))
    known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
    if first not in ("auto", *known):
        raise ValueError(f"use one of {['auto', *known]}; {SYNTAX}")
    everywhere = auto if first == "auto" else first
    chosen = {op: everywhere for op in IMPLEMENTATIONS if op not in FUSIONS}
    for exception in exceptions:
        op = exception.removeprefix("-")
        name = PARTS if op in FUSIONS else "torch"
        if not exception.startswith("-"):
            op, is_pair, name = exception.partition("=")
            if not is_pair:
                raise ValueError(f"{exception!r} is neither -OP nor OP=NAME; {SYNTAX}")
        if op not in IMPLEMENTATIONS:
            raise ValueError(f"there is no op {op!r}; use one of {list(IMPLEMENTATIONS)}")
        chosen[op] = name
    for fusion, (*_, parts) in FUSIONS.items():
        names = {chosen[part] for part in parts}
        chosen.setdefault(fusion, names.pop() if len(names) == 1 else PARTS)
    return chosen


def _check_runnable(chosen: dict[str, str], device_type: str) -> None:
    if device_type == "cpu" and "triton" in chosen.values() and not knobs.runtime.interpret:
        raise ValueError(
            "Triton kernels need a GPU (or TRITON_INTERPRET=1, for tests); "
            "use 'torch' with device='cpu'"
        )


def _assemble(chosen: dict[str, str]) -> Ops:
    known = {op: _find(op, name) for op, name in chosen.items() if op not in FUSIONS}
    for fusion, (composed, kind, _) in FUSIONS.items():
        if chosen[fusion] != PARTS:
            known[fusion] = _find(fusion, chosen[fusion])
            continue
        parts = kind(**{field.name: known[field.name] for field in fields(kind)})
        known[fusion] = partial(composed, parts)
    return Ops(**known)


def _find(op: str, name: str) -> Callable:
    known = IMPLEMENTATIONS[op]
    if name not in known:
        raise ValueError(
            f"{op} has no implementation {name!r}: use one of {sorted(known)} for it, "
            f"as in '{name},-{op}'"
        )
    return known[name]
