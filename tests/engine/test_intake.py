"""SamplingParams and a prompt to requests: where each value comes from and where it goes."""

from dataclasses import replace

import pytest

from ernie_engine import EngineConfig, SamplingParams
from ernie_engine.config import ModelConfig
from ernie_engine.engine.core import make_intake
from ernie_engine.engine.intake import DEFAULT_MAX_TOKENS, Intake
from ernie_engine.engine.plan import NO_LOGPROBS, SamplingSpec, derived_seed
from ernie_engine.text.generation import GenerationDefaults

PROMPT = [5, 6, 7]
MAX_MODEL_LEN = 100
EOS = frozenset([2, 9])
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def intake(tiny) -> Intake:
    """Of the tiny checkpoint, as if its generation_config.json said nothing."""
    model_config = ModelConfig.from_folder(tiny)
    config = EngineConfig(model=str(tiny), max_model_len=MAX_MODEL_LEN, device="cpu")
    made = make_intake(config.resolve(model_config, cuda=False), model_config)
    return replace(made, defaults=GenerationDefaults(), eos_ids=EOS)


def test_kernels_of_a_gpu_want_blocks_of_a_power_of_two(tiny):
    model_config = ModelConfig.from_folder(tiny)
    config = EngineConfig(model=str(tiny), block_size=48)
    assert config.resolve(model_config, cuda=False).block_size == 48
    with pytest.raises(ValueError, match=r"block_size=48.*power of two"):
        config.resolve(model_config, cuda=True)


def spec_of(intake: Intake, **params) -> SamplingSpec:
    return intake.job(PROMPT, SamplingParams(**params)).requests[0].spec


# field -> the usual default, a checkpoint's value, a caller's
VALUES = {
    "temperature": (1.0, 0.7, 0.25),
    "top_p": (1.0, 0.75, 0.375),
    "min_p": (0.0, 0.125, 0.0625),
    "repetition_penalty": (1.0, 1.25, 1.75),
    "presence_penalty": (0.0, 0.625, -0.5),
    "frequency_penalty": (0.0, -0.875, 1.125),
    "top_k": (0, 33, 7),
}
USUAL, CHECKPOINT, CALLER = ({name: values[i] for name, values in VALUES.items()} for i in range(3))


def sampling_values(spec: SamplingSpec) -> dict[str, float]:
    return {name: getattr(spec, name) for name in VALUES}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_the_callers_else_the_checkpoints_else_the_usual(intake, name):
    defaults = GenerationDefaults(**{name: CHECKPOINT[name]})
    tuned = replace(intake, defaults=defaults)
    assert sampling_values(spec_of(intake)) == USUAL
    assert sampling_values(spec_of(tuned)) == {**USUAL, name: CHECKPOINT[name]}
    asked = {name: CALLER[name]}
    assert sampling_values(spec_of(intake, **asked)) == {**USUAL, **asked}
    assert sampling_values(spec_of(tuned, **asked)) == {**USUAL, **asked}


def test_a_neutral_value_of_the_caller_wins_over_the_checkpoints(intake):
    tuned = replace(intake, defaults=GenerationDefaults(**CHECKPOINT))
    assert sampling_values(spec_of(tuned)) == CHECKPOINT
    neutral = {**USUAL, "temperature": 0.0}
    assert sampling_values(spec_of(tuned, **neutral)) == neutral


def test_top_k_minus_one_means_off(intake):
    assert spec_of(intake, top_k=-1).top_k == 0
    tuned = replace(intake, defaults=GenerationDefaults(top_k=-1))
    assert spec_of(tuned).top_k == 0
    assert spec_of(replace(intake, defaults=GenerationDefaults(top_k=4)), top_k=-1).top_k == 0


MAX_TOKENS = {  # name -> (the caller's, the checkpoint's, prompt tokens, expected total)
    "usual": (None, None, 3, 3 + DEFAULT_MAX_TOKENS),
    "checkpoint": (None, 30, 3, 33),
    "caller": (4, None, 3, 7),
    "caller over checkpoint": (4, 30, 3, 7),
    "up to the model's length": (90, None, 10, 100),
    "never beyond it": (91, None, 10, 100),
    "checkpoint neither": (None, 1000, 10, 100),
    "one token of room": (16, None, 99, 100),
}


@pytest.mark.parametrize("name", MAX_TOKENS)
def test_how_long_an_answer_may_get(intake, name):
    asked, default, num_prompt, total = MAX_TOKENS[name]
    tuned = replace(intake, defaults=GenerationDefaults(max_new_tokens=default))
    job = tuned.job([5] * num_prompt, SamplingParams(max_tokens=asked, n=2))
    assert [request.max_total_tokens for request in job.requests] == [total] * 2
    assert DEFAULT_MAX_TOKENS == 16


@pytest.mark.parametrize("asked, default, room", [(None, None, 97), (None, 8, 8), (5, 8, 5)])
def test_a_chat_answer_has_the_room_that_is_left(intake, asked, default, room):
    tuned = replace(intake, defaults=GenerationDefaults(max_new_tokens=default))
    job = tuned.chat_job(MESSAGES, SamplingParams(max_tokens=asked))
    num_prompt = len(intake.encode_chat(MESSAGES))
    total = MAX_MODEL_LEN if room == 97 else num_prompt + room
    assert job.requests[0].max_total_tokens == total
    assert (
        list(job.requests[0].token_ids) == intake.encode_chat(MESSAGES)
        and job.output.prompt is None
    )


def test_min_tokens_is_held_against_the_checkpoints_length_too(intake):
    tuned = replace(intake, defaults=GenerationDefaults(max_new_tokens=5))
    assert spec_of(tuned, min_tokens=5).min_tokens == 5
    with pytest.raises(ValueError, match="min_tokens=6 is above max_tokens=5"):
        spec_of(tuned, min_tokens=6)


BANS = {  # params -> (banned ids, eos ids, stop ids)
    "nothing asked": ({}, (), EOS, ()),
    "stop ids": ({"stop_token_ids": [30, 9]}, (), EOS, (9, 30)),
    "min_tokens": ({"min_tokens": 1}, (2, 9), EOS, ()),
    "both": ({"min_tokens": 3, "stop_token_ids": [30, 9]}, (2, 9, 30), EOS, (9, 30)),
    "eos ignored": ({"min_tokens": 3, "ignore_eos": True}, (), (), ()),
    "all": (
        {"min_tokens": 3, "stop_token_ids": [30], "ignore_eos": True},
        *((30,), (), (30,)),
    ),
}


@pytest.mark.parametrize("name", BANS)
def test_what_ends_an_answer_is_banned_before_min_tokens_only(intake, name):
    params, banned, eos_ids, stop_ids = BANS[name]
    request = intake.job(PROMPT, SamplingParams(**params)).requests[0]
    assert request.spec.banned_ids == banned
    assert request.spec.min_tokens == params.get("min_tokens", 0)
    assert request.eos_ids == frozenset(eos_ids) and request.stop_ids == frozenset(stop_ids)


def test_biases_keep_their_tokens(intake):
    spec = spec_of(intake, logit_bias={40: 1.5, 3: -2.5})
    assert dict(zip(spec.bias_ids, spec.bias_values, strict=True)) == {40: 1.5, 3: -2.5}


@pytest.mark.parametrize("count", [0, 4])
def test_the_prompt_is_scored_once_for_all_choices(intake, count):
    job = intake.job(PROMPT, SamplingParams(n=3, prompt_logprobs=count, logprobs=4 - count))
    scored = [request.spec.num_prompt_logprobs for request in job.requests]
    assert scored == [count, NO_LOGPROBS, NO_LOGPROBS]
    assert [request.spec.num_logprobs for request in job.requests] == [4 - count] * 3
    assert [a.wants_prompt_logprobs for a in job.assemblers] == [True, False, False]
    assert [a.wants_logprobs for a in job.assemblers] == [True] * 3


def test_no_logprobs_unless_asked(intake):
    job = intake.job(PROMPT, SamplingParams())
    spec, assembler = job.requests[0].spec, job.assemblers[0]
    assert (spec.num_logprobs, spec.num_prompt_logprobs) == (NO_LOGPROBS, NO_LOGPROBS)
    assert not assembler.wants_logprobs and not assembler.wants_prompt_logprobs


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_each_choice_draws_with_its_derived_seed(intake, seed):
    job = intake.job(PROMPT, SamplingParams(n=3, seed=seed))
    seeds = [request.spec.seed for request in job.requests]
    assert seeds == [seed, derived_seed(seed, 1), derived_seed(seed, 2)]


def test_without_a_seed_every_request_gets_another(intake):
    seeds = {spec_of(intake).seed for _ in range(4)}
    seeds |= {r.spec.seed for r in intake.job(PROMPT, SamplingParams(n=3)).requests}
    assert len(seeds) == 7


def test_choices_share_nothing_but_the_prompt(intake):
    one = intake.job(PROMPT, SamplingParams(n=3))
    two = intake.job(PROMPT, SamplingParams())
    requests = [*one.requests, *two.requests]
    assert len({request.request_id for request in requests}) == 4
    assert one.output.request_id == one.requests[0].request_id
    one.requests[0].token_ids.append(1)
    assert PROMPT == one.output.prompt_token_ids == list(one.requests[1].token_ids) == [5, 6, 7]
    assert [choice.index for choice in one.output.outputs] == [0, 1, 2]
    assert [assembler.index for assembler in one.assemblers] == [0, 1, 2]


def test_the_assembler_learns_what_concerns_text(intake):
    params = SamplingParams(stop="x", include_stop_str_in_output=True, max_tokens=9, min_tokens=4)
    assembler = intake.job("The engine", params).assemblers[0]
    assert assembler.include_stop and assembler.min_tokens == 4
    assert assembler.tokenizer is intake.tokenizer
