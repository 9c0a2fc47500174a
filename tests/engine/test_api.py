"""The Python API as its users see it: text, stops, log-probabilities, threads, streams, the end."""

import gc
import threading
import time

import pytest

from ernie_engine import Engine, EngineDeadError, SamplingParams
from tests.tiny import open_engine, token_ids

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny):
    with open_engine(tiny) as engine:
        yield engine


def scheduler_of(engine):
    return engine._core.scheduler


def wait_until_idle(engine, seconds: float = 10.0) -> None:
    """Nothing runs, nothing waits, every block and slot is free again."""
    deadline = time.monotonic() + seconds
    scheduler = scheduler_of(engine)
    while scheduler.has_requests or scheduler.pool.num_free != scheduler.pool.num_blocks:
        assert time.monotonic() < deadline, "a request or a block is left behind"
        time.sleep(0.01)
    assert len(scheduler._free_slots) == engine.config.max_num_seqs


def test_text_and_ids_and_lists(engine):
    ids = engine.tokenizer.encode("The engine")
    by_text, by_ids = engine.generate(["The engine", ids], GREEDY)
    assert by_text.prompt == "The engine" and by_ids.prompt is None
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == ids
    assert token_ids([by_text]) == token_ids([by_ids])
    (one,) = engine.generate("The engine", GREEDY)
    (also,) = engine.generate(ids, GREEDY)
    assert token_ids([one]) == token_ids([also]) == token_ids([by_text])
    answer = one.outputs[0]
    assert answer.text == engine.tokenizer.decode(answer.token_ids)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 12
    assert engine.generate([], GREEDY) == []


def test_one_params_each(engine):
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, 5)]
    outs = engine.generate([[5, 6], [5, 6]], params)
    assert [len(out.outputs[0].token_ids) for out in outs] == [1, 5]
    with pytest.raises(ValueError, match="params: 1 given for 2 prompts"):
        engine.generate([[5], [6]], params[:1])


def test_stop_token_ids_end_the_answer_and_are_named(engine):
    tokens = token_ids(engine.generate([9, 8, 7], GREEDY))[0][0]
    stop = tokens[4]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=[stop])
    answer = engine.generate([9, 8, 7], params)[0].outputs[0]
    expected = tokens[: tokens.index(stop) + 1]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (expected, "stop", stop)
    assert answer.text == engine.tokenizer.decode(expected[:-1])


def test_end_of_sequence_ends_the_answer_unless_ignored(engine):
    eos = engine.tokenizer.eos_token_id
    params = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={eos: 100.0})
    answer = engine.generate([9, 8, 7], params)[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ([eos], "stop", None)
    assert answer.text == ""


def test_min_tokens_holds_the_end_back(engine):
    eos = engine.tokenizer.eos_token_id
    params = SamplingParams(
        max_tokens=12, min_tokens=5, temperature=0.0, logit_bias={eos: 100.0}, stop_token_ids=[77]
    )
    answer = engine.generate([9, 8, 7], params)[0].outputs[0]
    assert len(answer.token_ids) == 6 and answer.token_ids[-1] == eos
    assert not {eos, 77} & set(answer.token_ids[:5])


@pytest.mark.parametrize("depth", [1, 3])
def test_stop_strings_across_tokens(tiny, depth):
    with open_engine(tiny, max_steps_in_flight=depth) as engine:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        text = engine.generate("The engine", params)[0].outputs[0].text
        cut = next(i for i in range(15, 40) if "\ufffd" not in text[i : i + 7])
        stop = text[cut : cut + 7]
        cut = text.index(stop)
        for include in (False, True):
            params = SamplingParams(
                max_tokens=40,
                temperature=0.0,
                ignore_eos=True,
                stop=[stop, "never there"],
                include_stop_str_in_output=include,
            )
            answer = engine.generate("The engine", params)[0].outputs[0]
            assert answer.text == text[: cut + include * len(stop)]
            assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
            decoded = engine.tokenizer.decode(answer.token_ids)
            before = engine.tokenizer.decode(answer.token_ids[:-1])
            assert stop in decoded and stop not in before  # ends at the completing token
        wait_until_idle(engine)


def test_logprobs_hold_the_token_and_its_alternatives(engine):
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
    answer = engine.generate([9, 8, 7], params)[0].outputs[0]
    assert len(answer.logprobs) == 6
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(found)) == token and len(found) == 3
        assert found[token].rank == 1 and found[token].logprob == max(
            other.logprob for other in found.values()
        )
        assert found[token].decoded_token == engine.tokenizer.token_text(token)
    assert [s.rank for s in list(answer.logprobs[0].values())] == [1, 2, 3]


def test_a_sampled_token_outside_the_alternatives_is_told_too(engine):
    params = SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True, logprobs=1, seed=1)
    answer = engine.generate([9, 8, 7], params)[0].outputs[0]
    ranks = [f[t].rank for t, f in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert max(ranks) > 1
    for rank, found in zip(ranks, answer.logprobs, strict=True):
        assert len(found) == (1 if rank == 1 else 2)


def test_prompt_logprobs_in_chunks_and_after_preemption(tiny):
    prompt = [(37 * i) % 690 + 5 for i in range(300)]
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    with open_engine(tiny) as engine:
        whole = engine.generate([prompt, prompt], params)
    with open_engine(tiny, max_num_batched_tokens=64) as engine:
        chunked = engine.generate([prompt, prompt], params)
    for output in [*whole, *chunked]:
        assert output.prompt_logprobs[0] is None
        assert [next(iter(p)) for p in output.prompt_logprobs[1:]] == prompt[1:]
    for a, b in zip(whole[0].prompt_logprobs[1:], chunked[1].prompt_logprobs[1:], strict=True):
        assert all(abs(a[t].logprob - b[t].logprob) < 1e-4 for t in a.keys() & b.keys())


def test_chat_is_the_template_then_generate(engine):
    messages = [{"role": "user", "content": "Hello"}]
    prompt = engine.tokenizer.encode("<|begin_of_sentence|>User: Hello\nAssistant: ")
    (one,) = engine.chat(messages, GREEDY)
    assert one.prompt_token_ids == prompt
    two = engine.chat([messages, messages], GREEDY)
    assert token_ids(two) == token_ids([one, one])
    (room,) = engine.chat(messages, SamplingParams(temperature=0.0, ignore_eos=True))
    assert len(prompt) + len(room.outputs[0].token_ids) == engine.config.max_model_len


def test_even_the_highest_temperature_draws_no_banned_token(engine):
    params = SamplingParams(max_tokens=9, min_tokens=8, temperature=1000.0, logit_bias={2: 100.0})
    answer = engine.generate([9, 8, 7], params)[0].outputs[0]
    assert 2 not in answer.token_ids[:8]


def test_penalties_and_bias_change_the_answer(engine):
    plain = token_ids(engine.generate([9, 8, 7], GREEDY))[0][0]
    never = SamplingParams(
        max_tokens=12, temperature=0.0, ignore_eos=True, logit_bias={t: -100.0 for t in plain}
    )
    assert not set(plain) & set(token_ids(engine.generate([9, 8, 7], never))[0][0])
    strong = SamplingParams(
        max_tokens=60, temperature=0.0, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0
    )
    weak = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    distinct = [len(set(token_ids(engine.generate([9, 8], p))[0][0])) for p in (strong, weak)]
    assert distinct[0] > distinct[1]


def test_generation_config_gives_defaults_and_the_caller_wins(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.0, "max_new_tokens": 7, "eos_token_id": [2, 300]}'
    )
    with open_engine(tmp_path) as engine:
        one, two = engine.generate([[9, 8, 7]] * 2, SamplingParams(ignore_eos=True))
        assert token_ids([one]) == token_ids([two])  # greedy by the file
        assert len(one.outputs[0].token_ids) == 7
        hot = SamplingParams(temperature=1.5, max_tokens=9, ignore_eos=True)
        three, four = engine.generate([[9, 8, 7]] * 2, hot)
        assert token_ids([three]) != token_ids([four])
        ended = SamplingParams(logit_bias={300: 100.0})
        assert engine.generate([9, 8], ended)[0].outputs[0].finish_reason == "stop"


def test_several_threads_at_once(engine):
    prompts = [[i + 5, i + 6] for i in range(12)]
    expected = [token_ids(engine.generate([p], GREEDY)) for p in prompts]
    found = [None] * len(prompts)

    def ask(i: int) -> None:
        if i % 2:
            found[i] = token_ids(engine.generate([prompts[i]], GREEDY))
        else:
            tokens = [t for piece in engine.stream(prompts[i], GREEDY) for t in piece.token_ids]
            found[i] = [[tokens]]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_closing_a_stream_early_aborts_its_request(engine):
    with engine.stream([5, 6, 7], LONG) as stream:
        next(stream)
    wait_until_idle(engine)
    dropped = engine.stream([5, 6, 7], LONG)
    next(dropped)
    del dropped
    gc.collect()
    wait_until_idle(engine)
    for piece in engine.stream([5, 6, 7], LONG):
        assert piece.finish_reason is None
        break
    gc.collect()
    wait_until_idle(engine)


def test_close_ends_what_is_open_and_twice_does_no_harm(tiny):
    engine = open_engine(tiny)
    stream = engine.stream([5, 6, 7], LONG)
    next(stream)
    engine.close()
    assert list(stream)[-1].finish_reason == "abort"
    engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        engine.generate([5], GREEDY)
    assert not engine._loop._thread.is_alive()


def test_a_failing_step_answers_everybody_and_ends_the_engine(tiny):
    with open_engine(tiny) as engine:
        stream = engine.stream([5, 6, 7], LONG)
        next(stream)

        def broken(plan):
            raise RuntimeError("the card is on fire")

        engine._core.ranks.stage.runner.launch = broken
        with pytest.raises(EngineDeadError, match="on fire"):
            list(stream)
        with pytest.raises(EngineDeadError, match="on fire"):
            engine.generate([5], GREEDY)


def test_a_folder_without_tokenizer_serves_token_ids(tiny, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny / name)
    with open_engine(tmp_path) as engine:
        answer = engine.generate([5, 6], GREEDY)[0].outputs[0]
        assert len(answer.token_ids) == 12 and answer.text == ""
        for bad in ("text", [{"role": "user", "content": "Hi"}]):
            call = engine.generate if isinstance(bad, str) else engine.chat
            with pytest.raises(ValueError, match="tokenizer"):
                call(bad, GREEDY)
        with pytest.raises(ValueError, match="stop"):
            engine.generate([5], SamplingParams(stop="x"))


def test_dummy_weights_need_only_a_config(tiny, tmp_path):
    (tmp_path / "config.json").symlink_to(tiny / "config.json")
    with open_engine(tmp_path, load_format="dummy") as engine:
        assert len(engine.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 12


def test_calls_of_ops_are_told_at_the_end(tiny, monkeypatch, capsys):
    monkeypatch.setenv("ERNIE_KERNELS", "torch")
    engine = Engine(model=str(tiny), device="cpu", log_kernels=True)
    assert engine.config.kernels == "torch"
    engine.generate([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.close()
    engine.close()
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines.count(["embedding", "torch", "3"]) == 1
    assert ["sample", "torch", "3"] in lines


def test_a_bad_choice_of_kernels_in_the_environment_is_named(tiny, monkeypatch):
    monkeypatch.setenv("ERNIE_KERNELS", "magic")
    with pytest.raises(ValueError, match=r"ERNIE_KERNELS.*use one of"):
        Engine(model=str(tiny), device="cpu")
