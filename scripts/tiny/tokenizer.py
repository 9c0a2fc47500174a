"""The sentencepiece model of ernie-tiny: its training, its use on chat turns, and its files in the
hub's format.

Special tokens are control pieces: text can never spell one. A chat is tokenised as at inference:
the rendered prompt, which ends in the lone "▁" of "Assistant: ", and after it the answer on its
own.
"""

import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers

from .sample import Sample, Split
from .tasks import draw_short

BEGIN, END, MASK = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>"
EXTRA = ("<mask:4>", "<mask:5>", "<mask:6>", "<mask:7>")  # system and header marks of the originals
SPECIALS = (BEGIN, END, MASK, *EXTRA)
MAX_PIECES = 4096


def train(num_pieces: int, seed: int, num_samples: int = 20_000) -> bytes:
    """A BPE model with byte fallback and one token a digit, as bytes of a `tokenizer.model`."""
    assert num_pieces <= MAX_PIECES, num_pieces
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(random.Random(f"tokenizer {seed}"), num_samples),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentence_length=16384,
        control_symbols=",".join(SPECIALS),
        pad_id=-1,
        num_threads=4,
        minloglevel=2,
    )
    return model.getvalue()


def _lines(rng: random.Random, count: int) -> Iterator[str]:
    """Text as the template shows it; answers also alone, since they are tokenised alone."""
    for _ in range(count):
        sample = draw_short(rng, Split.TRAIN)
        for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            yield from f"{sample.system}\nUser: {question}\nAssistant: {answer}".split("\n")
            yield answer
    yield "".join(map(chr, range(33, 127)))


class ChatEncoder:
    """Turns -> token ids under the PT chat template, with the tokens to be learned marked."""

    def __init__(self, model: bytes):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.begin, self.end = map(self.processor.piece_to_id, (BEGIN, END))
        self.vocab_size = self.processor.vocab_size()
        self._marker = self._encode("Assistant:")
        self._prompt_end = self._encode("Assistant: ")

    def _encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control pieces vanish."""
        return self.processor.decode(list(ids))

    def prompt(self, turns: Sequence[str], system: str = "") -> list[int]:
        """Ids of a conversation whose last turn is the user's, ready for the answer."""
        assert len(turns) % 2 == 1, turns
        return self._history(turns, system)[0] + self._prompt_end

    def sample(self, sample: Sample) -> tuple[list[int], list[bool]]:
        """Ids of the whole conversation, and for each whether it belongs to an answer (its end
        included).
        """
        ids, learned = self._history(sample.turns[:-1], sample.system)
        ids += self._prompt_end
        learned += [False] * len(self._prompt_end)
        answer = [*self._encode(sample.turns[-1]), self.end]
        return ids + answer, learned + [True] * len(answer)

    def _history(self, turns: Sequence[str], system: str) -> tuple[list[int], list[bool]]:
        """All turns but the open answer. A past answer is tokenised with its blank, as a rendered
        prompt is.
        """
        ids = [self.begin, *(self._encode(system + "\n") if system else ())]
        learned = [False] * len(ids)
        for i, text in enumerate(turns):
            if i % 2 == 0:
                piece, num_learned = self._encode(f"User: {text}\n"), 0
            else:
                piece = [*self._encode(f"Assistant: {text}"), self.end]
                num_learned = len(piece) - len(self._marker)
            ids += piece
            learned += [False] * (len(piece) - num_learned) + [True] * num_learned
        return ids, learned


def write_files(model: bytes, chat_template: str, folder: Path, max_length: int) -> None:
    """tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json,
    chat_template.jinja.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": BEGIN,
        "sep_token": END,
        "mask_token": MASK,
    }
    added = {
        str(processor.piece_to_id(piece)): {
            "content": piece,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for piece in ("<unk>", "<s>", "</s>", *SPECIALS)
    }
    config = {
        **named,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(EXTRA),
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": max_length,
        "padding_side": "right",
        "tokenizer_class": "Ernie4_5_Tokenizer",
    }
    (folder / "tokenizer.model").write_bytes(model)
    to_fast(model).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(
        folder / "special_tokens_map.json", {**named, "additional_special_tokens": list(EXTRA)}
    )
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_fast(model: bytes) -> Tokenizer:
    """The same BPE for the `tokenizers` package: merges are all pairs of pieces that join to a
    piece, best first.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, i in vocab.items():
        if processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [
            (-processor.get_score(i), vocab[a], vocab[b], (a, b))
            for a, b in splits
            if a in vocab and b in vocab
        ]
    fast = Tokenizer(
        models.BPE(
            vocab,
            [pair for *_, pair in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIALS])
    return fast
