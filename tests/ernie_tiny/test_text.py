"""Tokenizer and packing: what training sees is what inference will feed."""

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tiny.corpus import CONTEXT, FIRST_TASK, PAD, make_shard, pack, shards
from tiny.sample import Sample, Split
from tiny.settings import Settings, parse
from tiny.tasks import TASK_NAMES, draw_short, held_out
from tiny.tokenizer import BEGIN, END, MAX_PIECES, SPECIALS, ChatEncoder, to_fast, train
from transformers import AutoTokenizer

from ernie_engine.text.tokenizer import load_tokenizer


def short_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [draw_short(rng, Split.TRAIN) for _ in range(count)]


def test_tokenizer_is_small_and_reproducible(pieces: bytes):
    assert train(2048, seed=0) == pieces
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    assert processor.vocab_size() == 2048 <= MAX_PIECES
    assert [processor.piece_to_id(p) for p in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert len({processor.piece_to_id(piece) for piece in SPECIALS} - {0}) == len(SPECIALS)


def test_any_text_survives_and_spells_no_special(encoder: ChatEncoder):
    processor = encoder.processor
    for text in ("  two  blanks ", "é☃日本\n\ttab", f"{BEGIN} {END}</s><mask:1>", "12 345", ""):
        ids = processor.encode(text)
        assert processor.decode(ids) == text
        assert not any(processor.is_control(i) for i in ids)


def test_a_digit_is_a_token(encoder: ChatEncoder):
    pieces = encoder.processor.encode("What is 457 + 268?", out_type=str)
    assert [p for p in pieces if any(map(str.isdigit, p))] == list("457268")


def test_prompts_equal_the_rendered_template(smoke: Settings):
    """Our segments against transformers' rendering and tokenizer.json, and the engine's reader."""
    encoder = ChatEncoder((smoke.out / "tokenizer.model").read_bytes())
    theirs, engines = AutoTokenizer.from_pretrained(smoke.out), load_tokenizer(smoke.out)
    assert engines is not None
    for sample in short_samples(150) + held_out("turns", 50) + held_out("recall", 5):
        turns = sample.turns[:-1]
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        if sample.system:
            messages.insert(0, {"role": "system", "content": sample.system})
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = encoder.prompt(turns, sample.system)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert engines.encode(text) == ids
        assert theirs.decode(encoder.sample(sample)[0]) == text + sample.turns[-1] + END


def test_learned_tokens_are_the_answers_and_their_ends(encoder: ChatEncoder):
    sample = Sample("chat", ("Hi", "Hello there!", "What is 1 + 1?", "2"), system="Be brief.")
    ids, learned = encoder.sample(sample)
    spans, span = [], []
    for token, is_learned in zip(ids, learned, strict=True):
        span.append(token) if is_learned else span
        if span and (token == encoder.end or not is_learned):
            spans.append(span)
            span = []
    assert [encoder.decode(s).strip() for s in spans] == ["Hello there!", "2"]
    assert all(s[-1] == encoder.end for s in spans)


def test_fast_tokenizer_equals_sentencepiece(pieces: bytes, encoder: ChatEncoder):
    fast = to_fast(pieces)
    texts = [text for sample in short_samples(200, 1) for text in sample.turns]
    for text in [*texts, "unseen wörds, ☃ and\nlines", "   ", "Zzyzx qqq"]:
        assert fast.encode(text).ids == encoder.processor.encode(text)
        assert fast.decode(fast.encode(text).ids) == text


def test_packing_keeps_conversations_whole(encoder: ChatEncoder):
    samples = short_samples(4000, 2)
    rows = pack(encoder, iter(samples), count=24, length=512)
    assert (rows.classes == PAD).mean() < 0.05
    wanted = {tuple(encoder.sample(sample)[0]): sample.task for sample in samples}
    for tokens, classes, documents in zip(rows.tokens, rows.classes, rows.documents, strict=True):
        assert ((documents == 0) == (classes == PAD)).all()
        for number in range(1, documents.max() + 1):
            here = documents == number
            task = wanted[tuple(tokens[here].tolist())]
            answer = FIRST_TASK + TASK_NAMES.index(task)
            assert set(classes[here].tolist()) == {CONTEXT, answer}
            assert (np.diff(np.flatnonzero(here)) == 1).all()


def test_too_long_conversations_are_dropped(encoder: ChatEncoder):
    samples = [held_out("recall", 20)[i % 20] for i in range(40)] + short_samples(500)
    rows = pack(encoder, iter(samples), count=4, length=128)
    assert (rows.documents.max(1) >= 1).all()


def test_shards_do_not_depend_on_the_workers(pieces: bytes, encoder: ChatEncoder):
    one = parse(["--smoke", "--workers", "1"])
    two = parse(["--smoke", "--workers", "2"])
    with shards(one, pieces) as first, shards(two, pieces) as second:
        for index in range(3):
            a, b, c = next(first), next(second), make_shard(encoder, one, index)
            assert a.keys() == b.keys() == c.keys()
            assert all((a[k] == b[k]).all() and (a[k] == c[k]).all() for k in a)


def test_contexts_grow_along_the_ramp(encoder: ChatEncoder):
    settings = parse(["--smoke", "--ramp-shards", "10"])
    shards_at = [make_shard(encoder, settings, index) for index in (0, 9)]
    early, late = ((s["long_documents"].max(1)).mean() for s in shards_at)
    assert early > 2 * late  # fewer, longer conversations in a row


def test_a_dead_worker_is_noticed(tmp_path: Path):
    with (
        pytest.raises(RuntimeError, match="data worker"),
        shards(parse(["--smoke"]), b"no tokenizer") as data,
    ):
        next(data)


def test_settings():
    assert parse(["--lr", "0.5", "--smoke"]).lr == 0.5
    assert parse(["--smoke"]).hidden == 64 != parse([]).hidden
    assert sum(parse([]).is_long(step) for step in range(24)) == parse([]).long_steps
    assert parse(["--shares", "copy=0.5,json=0"]).task_shares()["copy"] == 0.5
    with pytest.raises(ValueError, match="no task 'poetry'"):
        parse(["--shares", "poetry=1"])
    with pytest.raises(ValueError, match="batch_tokens"):
        parse(["--batch-tokens", "1000"])
