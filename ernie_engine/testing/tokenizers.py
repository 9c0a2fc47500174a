"""A small sentencepiece tokenizer in the hub's format, trained on the project's own text.

Owns the list of its special tokens. Never downloads a text.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from ernie_engine.text.templates import built_in_template

PACKAGE = Path(__file__).parents[1]

DIGITS = list("0123456789")
MASKS = [f"<mask:{index}>" for index in range(8)]
SENTENCE = ["<|end_of_sentence|>", "<|begin_of_sentence|>"]
PT_ADDED = ["<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>", "<|LOC_0|>"]
THINKING_TURNS = ["<|im_start|>", "<|im_end|>"]
THINKING_TAGS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}
CONFIG_NAMES = {  # only tokenizer_config.json knows these
    "sys_start_token": "<mask:4>",
    "sys_end_token": "<mask:5>",
    "header_start_token": "<mask:6>",
    "header_end_token": "<mask:7>",
}
_CONTROL, _USER_DEFINED = 3, 4  # SentencePiece.Type in sentencepiece_model.proto
_MAX_PIECES = 8000  # keeps training within a second
_PADDING = 16  # ids that only the model has, as on the hub


def project_text() -> list[str]:
    """The lines of this package's sources and, in a checkout, of its documents."""
    root = PACKAGE.parent
    documents = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    in_checkout = (root / "pyproject.toml").is_file()
    paths = [*(documents if in_checkout else []), *sorted(PACKAGE.rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def train_tokenizer(
    vocab_size: int, *, text: Sequence[str] | None = None, add_dummy_prefix: bool = False
) -> bytes:
    """A BPE model with byte fallback, of at most `vocab_size` pieces, of `text` or project_text().

    Ids as on the hub: <unk>, <s>, </s>, ten digits, 256 bytes (a newline is <0x0A>, id 23), what
    was learned, and the special pieces last.
    ValueError if `vocab_size` is too small for the bytes and characters.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(project_text() if text is None else text),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size - len(MASKS) - len(SENTENCE),
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=add_dummy_prefix,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=DIGITS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size: cannot train a tokenizer of {vocab_size} pieces, choose a larger "
            f"vocabulary or no tokenizer: {error}"
        ) from error
    masks = [_piece(text, _USER_DEFINED) for text in MASKS]
    return b"".join([model.getvalue(), *masks, *(_piece(text, _CONTROL) for text in SENTENCE)])


def _piece(text: str, kind: int) -> bytes:
    """A ModelProto with one piece: protobuf messages that follow each other are one message."""
    data = text.encode()
    piece = bytes([0x0A, len(data), *data, 0x18, kind])  # field 1: text, field 3: type
    return bytes([0x0A, len(piece), *piece])


def write_tokenizer(
    folder: Path, vocab_size: int, thinking: bool, text: Sequence[str] | None = None
) -> None:
    """tokenizer.model, the JSON files beside it and chat_template.jinja; ids below `vocab_size`."""
    added = PT_ADDED + (THINKING_TURNS + THINKING_TAGS if thinking else [])
    num_pieces = min(vocab_size - len(added) - _PADDING, _MAX_PIECES)
    model = train_tokenizer(num_pieces, text=text)
    first_added = SentencePieceProcessor(model_proto=model).get_piece_size()
    ids = {token: first_added + index for index, token in enumerate(added)}
    extra = {"added_tokens_decoder": _added_tokens_decoder(ids)} if thinking else {}
    files = {
        "added_tokens.json": ids,
        "special_tokens_map.json": NAMES,
        "tokenizer_config.json": {
            **NAMES,
            **CONFIG_NAMES,
            "additional_special_tokens": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "model_max_length": 131072,
            "tokenizer_class": "LlamaTokenizer",
            **extra,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    template = built_in_template("thinking" if thinking else "pt")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(model)


def _added_tokens_decoder(ids: dict[str, int]) -> dict[str, dict[str, object]]:
    """The added tokens with their flags: the tags of the Thinking model are ordinary output."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(token_id): {"content": token, **flags, "special": token not in THINKING_TAGS}
        for token, token_id in ids.items()
    }
