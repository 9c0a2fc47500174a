"""What a caller asks for and what comes back, and one request's own state between the two.

Owns SamplingParams, Request and the output types. Never schedules, never touches text or tensors.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ernie_engine.engine.block_pool import PrefixHash
from ernie_engine.engine.plan import NO_LOGPROBS, SamplingSpec, TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]
MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_COUNT = (1 << 31) - 1
LARGEST = 3e38  # what fp32 holds
INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. None means: the checkpoint's generation_config decides, then the
    usual default (temperature 1, no filters, 16 tokens; in a chat, the room that is left).

    temperature 0 is greedy; between 0 and 0.01 it counts as 0.01. A logit_bias counts as at most
    100 either way. `logprobs` and `prompt_logprobs` count the likeliest alternatives to
    return beside each token; log-probabilities are the model's own, before penalties and filters.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 and -1: off
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self):
        for name, empty in (("stop", ()), ("stop_token_ids", ()), ("logit_bias", {})):
            if getattr(self, name) is None:  # as absent
                object.__setattr__(self, name, empty)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_float("temperature", self.temperature, 0.0, 1000.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("min_tokens", self.min_tokens, 0)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("seed", self.seed, INT64.start, INT64.stop - 1)
        _check_int("logprobs", self.logprobs, 0)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._check_lists()

    def _check_lists(self) -> None:
        stops = self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(t, str) and t for t in stops):
            raise ValueError("stop must be a string or strings, none of them empty")
        if not isinstance(self.stop_token_ids, Sequence):
            raise ValueError("stop_token_ids must be a list of token ids")
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias must map at most {MAX_BIASES} token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            _check_float(f"logit_bias[{token_id}]", bias, -math.inf, math.inf)

    def token_ids(self) -> dict[str, list[int]]:
        """The token ids that a caller named, by field: to be checked against a vocabulary."""
        return {"logit_bias": list(self.logit_bias), "stop_token_ids": list(self.stop_token_ids)}


def _check_float(
    name: str, value: float | None, low: float, high: float, low_open: bool = False
) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -LARGEST <= value <= LARGEST:  # nor NaN
        raise ValueError(f"{name} must be a finite number, not {value!r:.200}")
    if not low <= value <= high or (low_open and value == low):
        raise ValueError(f"{name}={value} is outside {'(' if low_open else '['}{low}, {high}]")


def _check_int(name: str, value: int | None, low: int, high: int = MAX_COUNT) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, not {value!r:.200}")
    if not low <= value <= high:
        raise ValueError(f"{name} is outside [{low}, {high}]")


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being continued.

    Tokens are *known* (token_ids), *promised* (to be drawn by steps in flight) or *computed*
    (their K/V is in the cache, or will be when the steps in flight are done).
    """

    request_id: int
    token_ids: "array[int]"  # int64: long prompts are hashed and sent as the bytes they are
    spec: SamplingSpec
    max_total_tokens: int  # prompt and answer together
    eos_ids: frozenset[int] = frozenset()  # end the answer, no stop_reason
    stop_ids: frozenset[int] = frozenset()  # the caller's own, told as stop_reason
    num_prompt_tokens: int = 0

    slot: int = -1
    num_promised: int = 0
    num_computed: int = 0
    num_prompt_scored: int = 0  # prompt tokens whose log-probabilities are returned or in flight
    num_cached_tokens: int = 0  # prefix hits at the first admission
    num_preemptions: int = 0
    moved_by: int = -1  # the last step that computed some of its tokens
    sampled_by: int = -1  # the last step that drew one
    started_at: float = 0.0  # by the loop's clock: when it was first planned
    block_ids: list[int] = field(default_factory=list)
    prefix: PrefixHash | None = None  # of the known tokens, once somebody has asked
    num_published: int = 0  # leading blocks that the pool knows by digest
    finished: bool = False

    def __post_init__(self):
        self.token_ids = array("q", self.token_ids)
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Known and promised tokens."""
        return len(self.token_ids) + self.num_promised

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be drawn; 0 once the last one is promised."""
        num_tokens = self.num_tokens
        return 0 if num_tokens >= self.max_total_tokens else num_tokens - self.num_computed

    @property
    def num_answered(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        wanted = self.spec.num_prompt_logprobs != NO_LOGPROBS
        return wanted and self.num_prompt_scored < self.num_prompt_tokens - 1


class TokenOutput(NamedTuple):  # one a row and step: cheaper to make than a frozen dataclass
    """What one step brought one request, as the scheduler tells it: tokens, no text yet."""

    request_id: int
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # continue where the previous ones ended
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability (natural logarithm), rank (1 = likeliest) and text."""

    logprob: float
    rank: int
    decoded_token: str


Logprobs = dict[int, Logprob]  # token id -> Logprob: the token itself, then its alternatives


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one choice. A whole answer is the fold of its pieces."""

    index: int  # the choice, 0 <= index < n
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One choice: its text, tokens and why it ended."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        if piece.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs.extend(piece.logprobs)
        self.finish_reason = piece.finish_reason
        self.stop_reason = piece.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its n answers. `prompt` is None when token ids were given."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None  # the first token has none
    num_cached_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.outputs[piece.index].add(piece)
        if piece.prompt_logprobs is not None and piece.index == 0:
            self.prompt_logprobs = [] if self.prompt_logprobs is None else self.prompt_logprobs
            self.prompt_logprobs.extend(piece.prompt_logprobs)
        if piece.index == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, piece.num_cached_tokens)
