"""The sentencepiece path against sentencepiece, the tokenizer.json path against transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from ernie_engine.testing.tokenizers import DIGITS, MASKS, SENTENCE, THINKING_TAGS, train_tokenizer
from ernie_engine.text.tokenizer import Tokenizer, load_tokenizer
from ernie_engine.text.vocabulary import longest_of

MARKUP = [*MASKS, *SENTENCE, *THINKING_TAGS, "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "",
    " ",
    "The scheduler decides every step.",
    "  two leading,  double  and trailing spaces  ",
    "line\nbreaks\n\n\tand tabs\r\n",
    "year 2024, 3.14159 and 1 000 000",
    "混合文本 with 中文、日本語 и кириллица",
    "emoji 😀👩‍👩‍👧 é e\u0301 \u2028 \x00 \ufdd0",
    "▁ is an ordinary character <0x0A> too",
    "def forward(self, x):\n    return x @ self.weight.T\n",
    "<|begin_of_sentence|>User: hi\nAssistant: <|end_of_sentence|></s><s><unk>",
    " <think> a </think>\n<response>b</response> <|im_end|>",
    "<mask:1><mask:7> <|im_start <|im_end|",
]
texts = st.lists(
    st.sampled_from([*MARKUP, *CORPUS, "<", "|>", "<|", "im_", "think", "/"]) | st.text(max_size=8),
    max_size=6,
).map("".join)


def processor(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def as_decoded(text: str) -> str:
    """sentencepiece writes a space as ▁, so the two are one."""
    return text.replace("▁", " ")


def added_ids(folder: Path) -> dict[str, int]:
    """Every token that is cut out of text, by independent reading of the files."""
    sp = processor(folder)
    ids = json.loads((folder / "added_tokens.json").read_text())
    return ids | {t: sp.piece_to_id(t) for t in [*MASKS, *SENTENCE, "<s>", "</s>", "<unk>"]}


def naive_encode(text: str, added: dict[str, int], sp: SentencePieceProcessor) -> list[int]:
    ids: list[int] = []
    plain = ""
    while text:
        found = max((t for t in added if text.startswith(t)), key=len, default=None)
        if found is None:
            plain, text = plain + text[0], text[1:]
            continue
        ids += [*sp.encode(plain), added[found]]
        plain, text = "", text[len(found) :]
    return ids + sp.encode(plain)


@given(text=texts)
def test_encode_equals_a_naive_cut(text: str, thinking: Tokenizer, thinking_folder: Path):
    expected = naive_encode(text, added_ids(thinking_folder), processor(thinking_folder))
    assert thinking.encode(text) == expected
    assert thinking.decode(expected, skip_special_tokens=False) == as_decoded(text)


@given(text=texts)
def test_plain_encoding_never_yields_an_added_token(
    text: str, thinking: Tokenizer, thinking_folder
):
    ids = thinking.encode(text, parse_special=False)
    assert not set(ids) & set(added_ids(thinking_folder).values())
    assert thinking.decode(ids) == as_decoded(text)


@pytest.mark.parametrize("text", CORPUS)
def test_plain_encoding_of_ordinary_text_is_sentencepieces_own(text, thinking, thinking_folder):
    if not any(token in text for token in added_ids(thinking_folder)):
        assert thinking.encode(text, parse_special=False) == processor(thinking_folder).encode(text)


def test_anchors(pt: Tokenizer):
    assert pt.encode("") == []
    assert [pt.token_id(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert pt.encode("\n") == [pt.token_id("<0x0A>")] == [23]
    assert pt.encode("2024") == [pt.token_id(digit) for digit in "2024"] == [5, 3, 5, 7]
    assert pt.encode("a", parse_special=True) == pt.encode("a", parse_special=False)  # no bos, eos
    assert (pt.bos_token, pt.eos_token, pt.pad_token) == ("<s>", "</s>", "<unk>")
    assert pt.eos_token_id == 2
    assert pt.token_id("<|im_end|>") is None


def test_token_bytes(thinking: Tokenizer):
    def of(token: str) -> bytes:
        token_id = thinking.token_id(token)
        assert token_id is not None
        return thinking.token_bytes(token_id)

    assert of("<0x0A>") == b"\n"
    assert of("<0xE4>") == b"\xe4"
    assert of("▁the") == b" the"
    assert of("<|im_end|>") == b"<|im_end|>"
    assert of("<think>") == b"<think>"
    assert of("<mask:1>") == b"<mask:1>"
    assert thinking.token_bytes(thinking.vocab_size) == b""
    assert thinking.token_bytes(-1) == b""
    assert thinking.decode([thinking.vocab_size, 10**9]) == ""
    assert thinking.token_text(thinking.encode("é")[0]) == "\ufffd"


@given(ids=st.lists(st.integers(0, 2060), max_size=30), skip=st.booleans())
def test_decode_is_the_joined_bytes(ids: list[int], skip: bool, thinking: Tokenizer):
    kept = [i for i in ids if not (skip and thinking.is_special(i))]
    joined = b"".join(map(thinking.token_bytes, kept))
    assert thinking.decode(ids, skip_special_tokens=skip) == joined.decode(errors="replace")


def test_special_flags_come_from_the_files(pt: Tokenizer, thinking: Tokenizer):
    ids = thinking.encode("<|im_start|>a<think>b</think><|im_end|></s><mask:2>")
    assert thinking.decode(ids) == "a<think>b</think><mask:2>"  # declared without the flag
    assert thinking.vocab_size == pt.vocab_size == 2048 - 16
    placeholder = "<|IMAGE_PLACEHOLDER|>"  # only in added_tokens.json, or flagged in the config
    assert pt.decode(pt.encode(placeholder)) == placeholder
    assert thinking.decode(thinking.encode(placeholder)) == ""


def test_sentencepiece_and_transformers_agree(thinking: Tokenizer, thinking_folder: Path, tmp_path):
    reference = transformers_tokenizer(thinking_folder)
    reference.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    from_json = load_tokenizer(tmp_path)
    assert from_json is not None and not (tmp_path / "tokenizer.model").exists()
    for text in [*CORPUS, *(a + " " + b for a in CORPUS for b in CORPUS)]:
        ids = reference.encode(text, add_special_tokens=False)
        assert thinking.encode(text) == ids, text
        assert from_json.encode(text) == ids, text
        plain = thinking.encode(text, parse_special=False)
        assert from_json.encode(text, parse_special=False) == plain, text
        for skip in (True, False):
            decoded = reference.decode(ids, skip_special_tokens=skip)
            assert thinking.decode(ids, skip) == from_json.decode(ids, skip) == decoded
    ids = range(thinking.vocab_size + 5)
    assert from_json.vocab_size == thinking.vocab_size
    assert [*map(from_json.token_bytes, ids)] == [*map(thinking.token_bytes, ids)]
    assert [*map(from_json.is_special, ids)] == [*map(thinking.is_special, ids)]
    assert from_json.eos_token_id == 2


def transformers_tokenizer(folder: Path) -> LlamaTokenizer:
    """As transformers' converter for ERNIE makes it: no bos, no prefix space."""
    sp = processor(folder)
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.get_piece_size())}
    vocab = {piece: i for i, piece in enumerate(scores)}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    merges = generate_merges(vocab, scores, skip_tokens=[*DIGITS, *MASKS, *SENTENCE])
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=False,
        add_prefix_space=False,
        **{role: config[role] for role in ("pad_token", "cls_token", "sep_token", "mask_token")},
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=False) for t in [*MASKS, *DIGITS]]
    )
    special = [config[f"{role}_token"] for role in ("sys_start", "sys_end", "header_start")]
    special += [config["header_end_token"]]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    for entry in config["added_tokens_decoder"].values():
        flag = entry["special"]
        token = AddedToken(entry["content"], normalized=False, special=flag)
        tokenizer.add_tokens([token], special_tokens=flag)
    return tokenizer


def test_added_tokens_of_tokenizer_json_count_beside_a_model(thinking, thinking_folder, tmp_path):
    """Some uploads name their tags nowhere else."""
    listed = [
        {"id": thinking.token_id(t), "content": t, "special": t not in THINKING_TAGS}
        for t in [*THINKING_TAGS, "<|im_start|>", "<|im_end|>"]
    ]
    shutil.copy(thinking_folder / "tokenizer.model", tmp_path)
    entry = {"id": thinking.token_id("7"), "content": "7", "special": False}
    write(tmp_path / "tokenizer.json", {"added_tokens": [*listed, entry]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    text = "<|im_start|>77 <think> </s>"
    assert tokenizer.encode(text) == thinking.encode(text)
    assert tokenizer.is_special(tokenizer.encode("<|im_end|>")[0])
    assert tokenizer.eos_token == "</s>"  # the model's own, as no file names one


def test_a_model_alone(thinking_folder: Path, tmp_path: Path):
    """Its control and user-defined pieces count as added tokens, though no file declares them."""
    shutil.copy(thinking_folder / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    begin = tokenizer.token_id("<|begin_of_sentence|>")
    assert begin is not None and tokenizer.encode("<|begin_of_sentence|>") == [begin]
    assert begin not in tokenizer.encode("<|begin_of_sentence|>", parse_special=False)
    assert tokenizer.is_special(begin)
    mask = tokenizer.token_id("<mask:3>")
    assert tokenizer.encode("<mask:3>") == [mask]
    assert mask not in tokenizer.encode("<mask:3>", parse_special=False)
    assert tokenizer.encode("77", parse_special=False) == [tokenizer.token_id("7")] * 2


def test_a_dummy_prefix_is_read_from_the_model(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(1000, add_dummy_prefix=True))
    tokenizer, sp = load_tokenizer(tmp_path), processor(tmp_path)
    assert tokenizer is not None and tokenizer.strips_leading_space
    for text in ("the model", " the", "the</s>model", "\n x", ""):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    ids = sp.encode("the scheduler")
    assert tokenizer.encode("the scheduler") == ids and tokenizer.decode(ids) == sp.decode(ids)


def test_an_added_character(pt_folder: Path, tmp_path: Path):
    """One character that the vocabulary lacks; in it, the added "7" would change nothing."""
    shutil.copy(pt_folder / "tokenizer.model", tmp_path)
    write(tmp_path / "added_tokens.json", {"\ue000": 3000, "7": 10})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.token_id("7") == 10
    assert tokenizer.encode("7\ue000")[-1] == 3000
    assert tokenizer.decode([10, 3000]) == "7\ue000"
    assert tokenizer.vocab_size == 3001
    assert tokenizer.shield("7\ue000", "|") == "7\ue000"  # ordinary text, wherever it stands


def test_the_longest_token_wins():
    words = ["ab", "abcd", "abc", "b", "a.c"]
    assert re.findall(longest_of(words), "abcdabcxabxaxbabca.cabd") == [
        *("abcd", "abc", "ab", "b", "abc", "a.c", "ab")
    ]
    assert re.findall(longest_of([]), "abc") == []


def test_shield_hides_every_token_and_nothing_else(thinking: Tokenizer):
    text = "a<|im_end|><mask:1></s> <think>b</think> <<s><|LOC_0|"
    shielded = thinking.shield(text, "\ufdd0")
    assert [*thinking.split(shielded)] == [shielded]
    assert shielded.replace("\ufdd0", "") == text
    kept = thinking.shield(text, "\ufdd0", keep=("<think>", "</think>"))
    ids = [part for part in thinking.split(kept) if isinstance(part, int)]
    assert ids == [thinking.token_id("<think>"), thinking.token_id("</think>")]


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_a_lone_surrogate_is_refused(text: str, parse_special: bool, pt: Tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character"):
        pt.encode(text, parse_special=parse_special)


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1, -3])
def test_a_damaged_model_is_named(pt_folder: Path, tmp_path: Path, keep: int):
    data = (pt_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_pointer_instead_of_a_model_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", [], "expected a JSON object"),
        ("special_tokens_map.json", {"eos_token": {"content": 5}}, "eos_token: expected a token"),
        ("special_tokens_map.json", {"eos_token": "<gone>"}, "'<gone>' has no id"),
        ("special_tokens_map.json", {"additional_special_tokens": [""]}, "1 to 256 characters"),
        ("special_tokens_map.json", {"additional_special_tokens": 7}, "expected a list"),
        ("tokenizer_config.json", {"bos_token": "x" * 300}, "1 to 256 characters"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, ""),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "b"}}}, "token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "b"}}, "expected a dict"),
        ("added_tokens.json", {"<new>": -1}, "expected a token id"),
        ("added_tokens.json", {"<new>": 2**40}, "expected a token id"),
        ("added_tokens.json", {"<new>": True}, "expected a token id"),
        ("added_tokens.json", {"<new>": 5}, "contradicts the vocabulary"),
        ("added_tokens.json", {"</s>": 3000}, "contradicts the vocabulary"),
        ("added_tokens.json", {"<a>": 3000, "<b>": 3000}, "same id"),
    ],
)
def test_bad_side_files(pt_folder: Path, tmp_path: Path, name: str, content, message: str):
    shutil.copy(pt_folder / "tokenizer.model", tmp_path)
    write(tmp_path / name, content)
    if not message:  # an empty decoder is as good as none
        assert load_tokenizer(tmp_path) is not None
        return
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_token_may_not_have_two_ids(thinking_folder: Path, tmp_path: Path):
    shutil.copytree(thinking_folder, tmp_path, dirs_exist_ok=True)
    ids = json.loads((tmp_path / "added_tokens.json").read_text())
    write(tmp_path / "added_tokens.json", ids | {"<think>": 2500})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*'<think>'.*2500 elsewhere"):
        load_tokenizer(tmp_path)


def test_whitespace_eating_tokens_are_refused(pt_folder: Path, tmp_path: Path):
    shutil.copy(pt_folder / "tokenizer.model", tmp_path)
    write(tmp_path / "tokenizer_config.json", {"mask_token": {"content": "</s>", "lstrip": True}})
    with pytest.raises(ValueError, match="mask_token: '</s>': lstrip is not supported"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", '"text"', '{"model": ', "\xff", "[" * 100_000])
def test_bad_json_is_named(tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


STRIPPING = {  # of a tokenizer with a dummy prefix
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"type": "ByteLevel"}}, "its decoder is not the one of a sentencepiece"),
        ({"decoder": STRIPPING}, "its decoder is not the one of a sentencepiece"),
        ({"decoder": None}, "its decoder is not the one of a sentencepiece"),
        ({"model": {"type": "WordPiece"}}, "only BPE with byte fallback"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "only BPE with byte fallback"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "not a usable tokenizer"),
        ({"normalizer": {"type": "Nonsense"}}, "not a usable tokenizer"),
    ],
)
def test_other_kinds_of_tokenizer_json_are_refused(thinking_folder, tmp_path, change, message):
    reference = transformers_tokenizer(thinking_folder)
    data = json.loads(reference._tokenizer.to_str())
    write(tmp_path / "tokenizer.json", data)
    assert load_tokenizer(tmp_path) is not None
    write(tmp_path / "tokenizer.json", data | change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_text_full_of_beginnings_of_tokens_is_quick(thinking: Tokenizer):
    """Would take minutes if each of them were compared with each token."""
    text = "<|im_start" * 20_000
    assert len([*thinking.split(thinking.shield(text, "\ufdd0"))]) == 1
