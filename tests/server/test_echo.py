"""Echo and prompt scores as evaluation harnesses read them, against the Python API's numbers."""

import pytest

from ernie_engine import SamplingParams
from tests.tiny import open_engine

PROMPTS = [[5, 6, 7], list(range(300, 340)), [9], [650, 20, 20, 21]]
SCORING = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}


@pytest.fixture(scope="module")
def direct(tiny):
    """Scores of the same checkpoint in this process: [prompt][position] -> {id: Logprob}"""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, prompt_logprobs=1)
    with open_engine(tiny) as engine:
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    return [[*out.prompt_logprobs, *out.outputs[0].logprobs] for out in outputs]


def test_a_harness_reads_the_right_numbers(served, direct):
    """prompt length + 1 entries, the first null; positions [context_len : -1] are scores."""
    answer = served.complete(PROMPTS, **SCORING).json()
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        prompt, scores = PROMPTS[choice["index"]], direct[choice["index"]]
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for position, token in enumerate(prompt[1:], start=1):
            expected = scores[position]
            assert found["token_logprobs"][position] == pytest.approx(
                expected[token].logprob, abs=1e-5
            )
            best = max(logprob.logprob for logprob in expected.values())
            assert max(found["top_logprobs"][position].values()) == pytest.approx(best, abs=1e-5)
            is_greedy = expected[token].rank == 1
            top = found["top_logprobs"][position].values()
            assert (found["token_logprobs"][position] == max(top)) == is_greedy
        assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())


def test_a_prompt_of_full_length_less_one_can_be_scored(served):
    prompt = [(37 * i) % 690 + 5 for i in range(511)]
    found = served.complete([prompt], **SCORING).json()["choices"][0]["logprobs"]
    assert len(found["tokens"]) == 512
    again = served.complete([prompt, prompt], **SCORING).json()["choices"]
    assert again[0]["logprobs"] == again[1]["logprobs"]  # and no prefix hit skips a score


def test_offsets_point_into_the_text(served):
    for echo in (True, False):
        for prompt in ("The engine, naïve 🙂 text", "</s>x The</s>", [5, 300, 23, 150, 151, 400]):
            choice = served.complete(
                prompt, max_tokens=20, temperature=0, ignore_eos=True, logprobs=0, echo=echo
            ).json()["choices"][0]
            found, text = choice["logprobs"], choice["text"]
            offsets = found["text_offset"]
            assert offsets[0] == 0 and offsets == sorted(offsets)
            assert [found["tokens"][i] for i in range(len(offsets))] == found["tokens"]
            ends = [*offsets[1:], len(text)]
            for token, start, end in zip(found["tokens"], offsets, ends, strict=True):
                if "\ufffd" not in token:
                    assert text[start:end].endswith(token)


def test_echo_gives_the_prompt_back(served):
    text = "The  engine\n</s> é"
    tokens = served.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    for prompt in (text, tokens):
        answer = served.complete(prompt, max_tokens=2, temperature=0, echo=True, n=2).json()
        assert all(choice["text"].startswith(text) for choice in answer["choices"])


def test_no_tokens_with_echo_return_the_prompt_alone(served):
    answer = served.complete([5, 6, 7], max_tokens=0, echo=True, logprobs=2, stop="a").json()
    (choice,) = answer["choices"]
    assert (
        choice["text"]
        == served.http.post("/detokenize", json={"tokens": [5, 6, 7]}).json()["prompt"]
    )
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None
    assert len(choice["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == 3
    hidden = served.complete([5, 6, 7], max_tokens=1, temperature=0, return_token_ids=True).json()
    stops = hidden["choices"][0]["token_ids"]
    (stopped,) = served.complete(
        [5, 6, 7], max_tokens=0, echo=True, temperature=0, stop_token_ids=stops
    ).json()["choices"]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("length", None)
    plain = served.complete("Hello", max_tokens=0, echo=True, n=2).json()["choices"]
    assert [choice["text"] for choice in plain] == ["Hello", "Hello"]
    assert served.complete("Hello", max_tokens=0).status_code == 400


def test_prompt_logprobs(served, direct):
    for count in (0, 1):
        answer = served.complete(
            PROMPTS[1], max_tokens=1, prompt_logprobs=count, echo=True, logprobs=3
        )
        found = answer.json()["choices"][0]["prompt_logprobs"]
        assert found[0] is None and len(found) == len(PROMPTS[1])
        for token, score, expected in zip(PROMPTS[1][1:], found[1:], direct[1][1:], strict=False):
            own = score[str(token)]
            assert own["rank"] == expected[token].rank
            assert own["logprob"] == pytest.approx(expected[token].logprob, abs=1e-5)
            assert own["decoded_token"] == expected[token].decoded_token
            assert len(score) == (1 if count == 0 or own["rank"] == 1 else 2)
    messages = [{"role": "user", "content": "Hi"}]
    body = {"messages": messages, "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    choice = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
