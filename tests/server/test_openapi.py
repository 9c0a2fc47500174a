"""/openapi.json is true: its references exist, its routes are served, answers are as it says."""

import json

import pytest
from pydantic import ConfigDict, TypeAdapter

from ernie_engine.server import answers
from tests.server.sse import CHAT, COMPLETIONS, read_stream

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def document(served):
    return served.http.get("/openapi.json").json()


def test_references_exist_and_names_are_unique(document):
    schemas = document["components"]["schemas"]
    refs = {part.split('"')[0] for part in json.dumps(document).split('"$ref": "')[1:]}
    assert refs and all(ref.removeprefix("#/components/schemas/") in schemas for ref in refs)
    operations = [o for path in document["paths"].values() for o in path.values()]
    assert len({o["operationId"] for o in operations}) == len(operations) >= 13
    assert document["openapi"] == "3.1.0"


def test_every_path_is_served(served, document):
    for path, operations in document["paths"].items():
        for method in operations:
            answer = served.http.request(method, path.replace("{model}", served.model))
            assert answer.status_code in ((200,) if method == "get" else (400, 415)), path


def strictly(kind):
    """A validator that also refuses keys that the type does not have."""
    for part in vars(answers).values():
        if isinstance(part, type) and hasattr(part, "__total__"):
            part.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return TypeAdapter(kind)


FULL = {"max_tokens": 3, "n": 2, "return_token_ids": True, "temperature": 1.0}


def test_answers_are_of_the_types_that_it_describes(served):
    completion = {**FULL, "prompt": "x", "logprobs": 2, "echo": True, "prompt_logprobs": 1}
    chat = {**FULL, "messages": USER, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}
    asked = [
        (answers.Completion, "POST", COMPLETIONS, completion),
        (answers.ChatCompletion, "POST", CHAT, chat),
        (answers.ChatCompletion, "POST", CHAT, {"messages": USER, "max_tokens": 2}),
        (answers.ErrorResponse, "POST", CHAT, {}),
        (answers.ErrorResponse, "POST", COMPLETIONS, {"prompt": [5] * 600}),
        (answers.Tokens, "POST", "/tokenize", {"prompt": "x", "return_token_strs": True}),
        (answers.Detokenized, "POST", "/detokenize", {"tokens": [5, 6]}),
        (answers.TokenizerInfo, "GET", "/tokenizer_info", None),
        (answers.ModelList, "GET", "/v1/models", None),
        (answers.ModelCard, "GET", f"/v1/models/{served.model}", None),
        (answers.Version, "GET", "/version", None),
        (answers.Load, "GET", "/load", None),
        (answers.Info, "GET", "/info", None),
    ]
    for kind, method, path, body in asked:
        strictly(kind).validate_json(served.http.request(method, path, json=body).content)
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for kind, path, body in (
        (answers.CompletionChunk, COMPLETIONS, {**completion, "prompt_logprobs": 0}),
        (answers.ChatCompletionChunk, CHAT, {**chat, "prompt_logprobs": 0}),
    ):
        for event in read_stream(served, path, {**body, **options})[0]:
            strictly(kind).validate_python(event)


def test_tokenize_and_detokenize_invert_each_other(served):
    def post(path, **body):
        return served.http.post(path, json=body).json()

    for text in ("", "Hello  world\n", "</s>x<|end_of_sentence|>", "naïve 🙂 文字"):
        found = post("/tokenize", prompt=text, return_token_strs=True)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == 512
        assert post("/detokenize", tokens=found["tokens"])["prompt"] == text
    assert len(post("/tokenize", prompt="</s>")["tokens"]) == 1
    chat = post("/tokenize", messages=USER)
    assert (
        chat["token_strs"] is None and "Hi" in post("/detokenize", tokens=chat["tokens"])["prompt"]
    )
    shorter = post("/tokenize", messages=USER, add_generation_prompt=False)
    assert shorter["count"] < chat["count"]
    in_content = post("/tokenize", messages=[{"role": "user", "content": "</s>"}])["tokens"]
    eos = post("/tokenize", prompt="</s>")["tokens"][0]
    assert eos not in in_content
    info = served.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and "messages" in info["chat_template"]
