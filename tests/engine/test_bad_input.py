"""Bad input gets an error that names the field; the next good request is answered all the same."""

import json
import math
import shutil
import threading
from enum import IntEnum

import pytest

from ernie_engine import Engine, SamplingParams
from ernie_engine.testing.checkpoints import write_checkpoint
from tests.tiny import SPEC, open_engine, token_ids

GOOD = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny):
    with open_engine(tiny) as engine:
        yield engine


@pytest.fixture(scope="module")
def good_answer(engine):
    return token_ids(engine.generate([5, 6, 7], GOOD))


BAD_PROMPTS = {
    "non-empty": [],
    "must be provided and non-empty": "",
    "out of vocabulary": [5, 700],
    "token id -1 is out of vocabulary": [5, -1],
    "token id 1000000000000000000000 is out of vocabulary": [5, 10**21],
    "must hold token ids": [5, 6.5],
    "not True": [5, True],
    "prompt has 512 tokens; with max_model_len=512": [5] * 512,
    r"prompt has 1000000 characters; max_model_len=512 tokens hold": "a" * 1_000_000,
    "prompt must be a text or token ids": None,
}


@pytest.mark.parametrize("prompts", [5, None, [5.0], {"role": "user"}], ids=str)
def test_prompts_of_another_type(engine, good_answer, prompts):
    with pytest.raises(ValueError, match="prompt"):
        engine.generate(prompts, GOOD)
    assert token_ids(engine.generate([5, 6, 7], GOOD)) == good_answer


class Token(IntEnum):
    FIVE, SIX, SEVEN = 5, 6, 7


def test_integers_of_ones_own_are_token_ids(engine, good_answer):
    assert token_ids(engine.generate([*Token], GOOD)) == good_answer


BAD_MESSAGES = [
    {"role": "user", "content": "x"},
    "text",
    [],
    [{"role": "user", "content": 5}],
    [{"content": "x"}],
    [[{"role": "user", "content": "x" * 1_000_000}]],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda m: str(m)[:40])
def test_bad_messages(engine, good_answer, messages):
    with pytest.raises(ValueError):
        engine.chat(messages, GOOD)
    assert token_ids(engine.generate([5, 6, 7], GOOD)) == good_answer


def test_none_counts_as_absent():
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None)
    assert params == SamplingParams()


def test_an_end_of_sequence_id_outside_the_vocabulary_is_ignored(tiny, tmp_path, good_answer):
    for file in tiny.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    with open_engine(tmp_path) as engine:
        engine.generate([5, 6], SamplingParams(min_tokens=3, max_tokens=4))
        assert token_ids(engine.generate([5, 6, 7], GOOD)) == good_answer


def test_a_bad_checkpoint_leaves_no_thread_behind(tiny, tmp_path):
    for file in tiny.iterdir():
        if file.name != "tokenizer.model":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    before = {t for t in threading.enumerate() if t.name == "engine-loop"}
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        open_engine(tmp_path)
    assert {t for t in threading.enumerate() if t.name == "engine-loop"} == before


@pytest.mark.parametrize("message", BAD_PROMPTS)
def test_bad_prompts(engine, good_answer, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([[5, 6, 7], BAD_PROMPTS[message]], GOOD)
    assert token_ids(engine.generate([5, 6, 7], GOOD)) == good_answer


BAD_PARAMS = [
    {"temperature": math.nan},
    {"temperature": -0.5},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_p": math.nan},
    {"top_k": -2},
    {"top_k": 2.5},
    {"min_p": -0.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -1.0},
    {"presence_penalty": 2.5},
    {"frequency_penalty": math.nan},
    {"max_tokens": 0},
    {"max_tokens": True},
    {"min_tokens": -1},
    {"n": 0},
    {"n": 129},
    {"seed": 1 << 63},
    {"logprobs": -1},
    {"prompt_logprobs": 1.5},
    {"stop": ""},
    {"stop": ["a", ""]},
    {"stop": [5]},
    {"stop": 5},
    {"stop_token_ids": 5},
    {"top_k": 1 << 63},
    {"min_tokens": 1 << 63, "max_tokens": 1 << 63},
    {"temperature": 10**400},
    {"temperature": 1e39},
    {"repetition_penalty": 1e308},
    {"ignore_eos": "false"},
    {"logit_bias": 5},
    {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    {"logit_bias": {5: math.nan}},
]


@pytest.mark.parametrize("fields", BAD_PARAMS, ids=str)
def test_bad_sampling_values_name_their_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={700: 1.0}),
        SamplingParams(stop_token_ids=[-3]),
        SamplingParams(logprobs=21),
        SamplingParams(prompt_logprobs=21),
        SamplingParams(min_tokens=17),  # above the default of 16
    ],
    ids=str,
)
def test_values_that_this_model_cannot_serve(engine, good_answer, params):
    with pytest.raises(ValueError):
        engine.generate([5, 6], params)
    assert token_ids(engine.generate([5, 6, 7], GOOD)) == good_answer


BAD_CONFIG = [
    {"dtype": "int4"},
    {"device": "tpu"},
    {"load_format": "pickle"},
    {"kernels": "magic"},
    {"max_model_len": 513},
    {"max_model_len": 1},
    {"max_num_seqs": 0},
    {"max_num_batched_tokens": -1},
    {"block_size": 1.5},
    {"gpu_memory_utilization": 1.2},
    {"gpu_memory_utilization": math.nan},
    {"kv_cache_memory_bytes": 0},
    {"kv_cache_memory_bytes": 1000},
    {"enable_prefix_caching": "yes"},
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
    {"max_steps_in_flight": 0},
    {"max_logprobs": -1},
    {"tensor_parallel_size": 3},
    {"tensor_parallel_size": 0},
    {"pipeline_parallel_size": 5},
    {"enable_expert_parallel": 1},
    {"distributed_timeout_seconds": 0},
    {"peer_timeout_seconds": 1.5},
    {"peer_timeout_seconds": math.nan},
    {"debug": "yes"},
]


@pytest.mark.parametrize("fields", BAD_CONFIG, ids=str)
def test_bad_configuration_names_its_field(tiny, fields):
    expected = "max_model_len" if fields == {"kv_cache_memory_bytes": 1000} else list(fields)[-1]
    with pytest.raises(ValueError, match=expected):
        open_engine(tiny, **fields)


def test_an_unknown_keyword_is_an_error(tiny):
    with pytest.raises(TypeError, match="max_modellen"):
        Engine(tiny, max_modellen=5)


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def remove_shard(folder):
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def change_config(name, value):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def remove_config(folder):
    (folder / "config.json").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"not a model")


DAMAGE = {
    "truncated shard": (truncate, "model-00003-of-00003.safetensors"),
    "corrupt header": (corrupt_header, "model-00003-of-00003.safetensors"),
    "missing shard": (remove_shard, "model-00003-of-00003.safetensors"),
    "missing config": (remove_config, "config.json"),
    "wrong shape": (change_config("intermediate_size", 97), r"mlp\.gate_proj.*97"),
    "too many layers": (change_config("num_hidden_layers", 5), r"layers\.4"),
    "too few layers": (change_config("num_hidden_layers", 3), r"layers\.3"),
    "another activation": (change_config("hidden_act", "gelu"), "hidden_act"),
    "biases": (change_config("use_bias", True), "use_bias"),
    "rope scaling": (change_config("rope_scaling", {"type": "linear"}), "rope_scaling"),
    "another model": (change_config("model_type", "llama"), "model_type"),
    "broken tokenizer": (break_tokenizer, "tokenizer.model"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    spec = {**vars(SPEC), "shards": 3}
    return write_checkpoint(tmp_path_factory.mktemp("sharded"), type(SPEC)(**spec))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(sharded, tmp_path, name, good_answer):
    damage, message = DAMAGE[name]
    folder = shutil.copytree(sharded, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_engine(folder)
    with open_engine(sharded) as engine:
        assert token_ids(engine.generate([5, 6, 7], GOOD)) == good_answer


def test_a_folder_that_is_not_there():
    with pytest.raises(ValueError, match="no/such/folder"):
        Engine("no/such/folder")
