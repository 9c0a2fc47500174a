"""The `openai` package against the served tiny checkpoint: what its users do every day."""

import asyncio

import openai
import pytest

GREEDY = {"temperature": 0.0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_the_seeds_own_client_runs_unchanged(served, capsys):
    """Module-level client, the model's path as its name, the answer iterated item by item."""
    openai.api_key = "EMPTY"
    openai.base_url = f"{served.url}/v1/"
    response = openai.chat.completions.create(
        model=served.model,
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Tell me a joke."},
        ],
        stream=False,
    )
    for item in response:
        print(item)
    assert "('choices', [Choice(finish_reason=" in capsys.readouterr().out


def test_models(served, client):
    (model,) = client.models.list().data
    assert model.id == served.model == model.root and "/" in model.id
    assert model.max_model_len == 512 and model.owned_by
    assert client.models.retrieve(served.model) == model
    quoted = served.model.replace("/", "%2F")
    assert served.http.get(f"/v1/models/{quoted}").json()["id"] == served.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such/model")


def test_completion(served, client):
    answer = client.completions.create(model=served.model, prompt="The engine", **GREEDY)
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.model == served.model and answer.system_fingerprint
    assert choice.finish_reason == "length" and choice.text and choice.logprobs is None
    tokens = served.http.post("/tokenize", json={"prompt": "The engine"}).json()["tokens"]
    assert answer.usage.prompt_tokens == len(tokens)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (8, len(tokens) + 8)
    by_ids = client.completions.create(model=served.model, prompt=tokens, **GREEDY)
    assert by_ids.choices == answer.choices


def test_chat(client, served):
    answer = client.chat.completions.create(model=served.model, messages=HELLO, **GREEDY)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.message.tool_calls is None and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}]
    joined = [{"role": "user", "content": "a\nb"}]
    one, two = (
        client.chat.completions.create(model=served.model, messages=m, **GREEDY).choices
        for m in (parts, joined)
    )
    assert one == two


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_streaming_adds_up_to_the_whole(client, served, kind):
    def ask(**options):
        if kind == "chat":
            return client.chat.completions.create(
                model=served.model, messages=HELLO, **GREEDY, **options
            )
        return client.completions.create(model=served.model, prompt="Hello", **GREEDY, **options)

    whole = ask()
    *chunks, last = list(ask(stream=True, stream_options={"include_usage": True}))
    assert last.choices == [] and last.usage == whole.usage
    assert len(chunks) == 8 and all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    choices = [chunk.choices[0] for chunk in chunks]
    if kind == "chat":
        assert [c.delta.role for c in choices].count("assistant") == 1
        text = "".join(c.delta.content for c in choices)
        assert text == whole.choices[0].message.content
    else:
        assert "".join(c.text for c in choices) == whole.choices[0].text
    assert [c.finish_reason for c in choices] == [None] * 7 + ["length"]


def test_the_stream_helper_of_the_package(client, served):
    with client.chat.completions.stream(model=served.model, messages=HELLO, **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.current_completion_snapshot  # the final one may not end by length
    assert kinds == {"chunk", "content.delta", "content.done"}
    whole = client.chat.completions.create(model=served.model, messages=HELLO, **GREEDY)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.role == "assistant"


def test_chat_logprobs(client, served):
    answer = client.chat.completions.create(
        model=served.model, messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for entry in content:
        best = entry.top_logprobs[0]
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob, entry.bytes) == (best.token, best.logprob, best.bytes)
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] <= 0
    text = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    assert text == answer.choices[0].message.content
    none = client.chat.completions.create(
        model=served.model, messages=HELLO, logprobs=True, **GREEDY
    )
    assert all(entry.top_logprobs == [] for entry in none.choices[0].logprobs.content)


def test_completion_logprobs(client, served):
    answer = client.completions.create(
        model=served.model, prompt="Hello", logprobs=2, seed=5, max_tokens=6, temperature=1.0
    )
    found = answer.choices[0].logprobs
    lengths = {len(values) for values in (found.tokens, found.token_logprobs, found.text_offset)}
    assert lengths == {answer.usage.completion_tokens} == {len(found.top_logprobs)}
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert logprob in top.values() and len(top) in (2, 3), token


def test_n_with_a_seed_gives_distinct_texts_the_same_again(client, served):
    def ask(n):
        answer = client.completions.create(
            model=served.model, prompt="Hello", n=n, seed=42, max_tokens=10, temperature=1.0
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices], answer.usage

    texts, usage = ask(3)
    assert len(set(texts)) == 3 and ask(3)[0] == texts and ask(1)[0] == texts[:1]
    tokens = served.http.post("/tokenize", json={"prompt": "Hello"}).json()["count"]
    assert usage.prompt_tokens == tokens
    greedy = client.completions.create(model=served.model, prompt="Hello", n=3, **GREEDY)
    assert len({choice.text for choice in greedy.choices}) == 1


def test_lists_of_prompts(client, served):
    prompts = ["Hello", "The engine"]
    both = client.completions.create(model=served.model, prompt=prompts, n=2, **GREEDY)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(model=served.model, prompt=prompt, **GREEDY)
        assert both.choices[2 * i].text == both.choices[2 * i + 1].text == alone.choices[0].text
    ids = [served.http.post("/tokenize", json={"prompt": p}).json()["tokens"] for p in prompts]
    by_ids = client.completions.create(model=served.model, prompt=ids, n=2, **GREEDY)
    assert by_ids.choices == both.choices
    events = client.completions.create(
        model=served.model, prompt=prompts, n=2, stream=True, **GREEDY
    )
    texts = {}
    for event in events:
        (choice,) = event.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in both.choices}


def test_stop_strings_and_ids(client, served):
    whole = client.completions.create(
        model=served.model,
        prompt="The engine",
        temperature=0.0,
        max_tokens=40,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]
    stop = whole.text[15:20]
    cut = client.completions.create(
        model=served.model,
        prompt="The engine",
        temperature=0.0,
        max_tokens=40,
        stop=[stop, "@@"],
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    choice = cut.choices[0]
    assert choice.text == whole.text[: whole.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == whole.token_ids[: len(choice.token_ids)]
    assert cut.usage.completion_tokens == len(choice.token_ids)
    token = whole.token_ids[5]
    by_id = client.completions.create(
        model=served.model,
        prompt="The engine",
        temperature=0.0,
        max_tokens=40,
        extra_body={"ignore_eos": True, "stop_token_ids": [token], "return_token_ids": True},
    ).choices[0]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", token)
    assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    served.wait_idle()


def test_errors_have_the_packages_classes(client, served):
    cases = [
        (
            openai.BadRequestError,
            {"model": served.model, "prompt": "x", "temperature": 3},
            "temper",
        ),
        (openai.NotFoundError, {"model": "nope", "prompt": "x"}, "The model `nope` does not exist"),
        (openai.BadRequestError, {"model": served.model, "prompt": [5] * 512}, "maximum context"),
        (openai.BadRequestError, {"model": served.model, "prompt": "x", "n": 129}, "n: "),
    ]
    for kind, fields, message in cases:
        with pytest.raises(kind, match=message) as caught:
            client.completions.create(**fields)
        assert set(caught.value.body) >= {"message", "type", "param", "code"}
        assert caught.value.request_id and caught.value.code == str(caught.value.status_code)
    with pytest.raises(openai.InternalServerError) as caught:  # 501
        client.embeddings.create(model=served.model, input="x")
    assert caught.value.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert client.completions.create(model=served.model, prompt="x", max_tokens=1).choices


def test_async_client(served):
    async def ask(client, i):
        stream = await client.chat.completions.create(
            model=served.model, messages=HELLO, seed=i, max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].delta.content async for chunk in stream])

    async def ask_all():
        async with served.async_client() as client:
            texts = await asyncio.gather(*(ask(client, i % 4) for i in range(16)))
            whole = await client.chat.completions.create(
                model=served.model, messages=HELLO, seed=1, max_tokens=12
            )
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model=served.model, messages=[])
            return texts, whole.choices[0].message.content

    texts, whole = asyncio.run(ask_all())
    assert texts == texts[:4] * 4 and texts[1] == whole and len(set(texts)) == 4
