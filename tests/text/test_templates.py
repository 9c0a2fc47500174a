"""Both templates of ERNIE-4.5 to the letter, and message content that stays text."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from ernie_engine.text import sandbox
from ernie_engine.text.templates import ChatTemplate, built_in_template, load_chat_template
from ernie_engine.text.tokenizer import Tokenizer

PT = ChatTemplate(built_in_template("pt"))
THINKING = ChatTemplate(built_in_template("thinking"))
SYS0 = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
GEN = "<|im_start|>assistant\n<think>\n"
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "<sum> & 'more' é"}},
    {"type": "function", "function": {"name": "sub", "parameters": {"a": 1}}},
]


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object, **fields: object) -> dict:
    return {"role": "assistant", "content": content, **fields}


CHAT = [{"role": "system", "content": "S"}, user("U1"), assistant("A1"), user("U2")]


@pytest.mark.parametrize(
    ("name", "size", "digest"), [("pt", 754, "471fb571"), ("thinking", 3659, "e141f14f")]
)
def test_the_built_in_templates_are_the_published_ones(name: str, size: int, digest: str):
    source = built_in_template(name).encode()
    assert len(source) == size and hashlib.sha256(source).hexdigest().startswith(digest)


def test_pt_chat():
    expected = (
        "<|begin_of_sentence|>S\nUser: U1\nAssistant: A1<|end_of_sentence|>User: U2\nAssistant: "
    )
    assert PT.render(CHAT) == expected
    without = PT.render(CHAT, add_generation_prompt=False)
    assert without == expected.removesuffix("Assistant: ")


def test_pt_chat_as_tokens(pt: Tokenizer):
    ids = PT.encode(CHAT, pt)
    assert pt.decode(ids, skip_special_tokens=False) == PT.render(CHAT)
    assert ids == pt.encode(PT.render(CHAT))
    assert ids[0] == pt.token_id("<|begin_of_sentence|>")
    assert ids.count(pt.token_id("<|end_of_sentence|>")) == 1
    assert ids[-1] == pt.token_id("▁")  # the space behind "Assistant:"


def test_thinking_one_question(thinking: Tokenizer):
    expected = SYS0 + "<|im_start|>user\nHi<|im_end|>\n\n" + GEN
    assert THINKING.render([user("Hi")]) == expected
    assert THINKING.render([user("Hi")], add_generation_prompt=False) == expected
    assert THINKING.encode([user("Hi")], thinking) == thinking.encode(expected)


def test_thinking_system_and_tools():
    head = "<|im_start|>system\n<system_setting>\n"
    tail = (
        "SYS\n</system_setting>\n\n<global_setting>\nthink_mode=True\n</global_setting>\n\n"
        '<tool_list>\n[{"type": "function", "function": '
        '{"name": "add", "description": "<sum> & \'more\' é"}},'
        '{"type": "function", "function": {"name": "sub", "parameters": {"a": 1}}}]\n'
        "</tool_list><|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n" + GEN
    )
    chat = [{"role": "developer", "content": "SYS"}, user("Hi")]
    assert THINKING.render(chat, tools=TOOLS) == head + tail
    with_settings = THINKING.render(chat, tools=TOOLS, system_settings="MORE")
    assert with_settings == head + "MORE\n" + tail


def test_thinking_drops_earlier_reasoning():
    expected = (
        SYS0 + "<|im_start|>user\nU1<|im_end|>\n\n"
        "<|im_start|>assistant\n<response>\nA1\n</response>\n<|im_end|>\n\n"
        "<|im_start|>user\nU2<|im_end|>\n\n" + GEN
    )
    answers = [
        assistant("<think>\nhmm\n</think>\n\nA1"),
        assistant("A1", thoughts="hmm"),
        assistant("A1", reasoning="hmm"),
        assistant("A1", reasoning_content="hmm"),
        assistant("A1"),
    ]
    for answer in answers:
        assert THINKING.render([user("U1"), answer, user("U2")]) == expected


TOOL_ROUND = (
    SYS0 + "<|im_start|>user\nU<|im_end|>\n\n"
    "<|im_start|>assistant\n<think>\nhmm\n</think>\n"
    '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '\n\n<tool_call>\n{"name": "sub", "arguments": {"a": 2}}\n</tool_call>\n'
    "<|im_end|>\n\n"
    '<|im_start|>tool\n<tool_output>"3"</tool_output>\n<tool_output>"4"</tool_output><|im_end|>\n\n'
    + GEN
)


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("field", ["thoughts", "reasoning", "reasoning_content"])
def test_thinking_tool_round(content: str | None, field: str, thinking: Tokenizer):
    calls = [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
        {"id": "2", "type": "function", "function": {"name": "sub", "arguments": '{"a": 2}'}},
    ]
    chat = [
        user("U"),
        assistant(content, tool_calls=calls, **{field: "hmm"}),
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "tool", "tool_call_id": "2", "content": "4"},
    ]
    assert THINKING.render(chat) == TOOL_ROUND
    assert THINKING.encode(chat, thinking) == thinking.encode(TOOL_ROUND)


def test_rendering_equals_transformers():
    chat = [user('x <é> & "'), assistant("<think>a</think>b"), {"role": "system", "content": "s"}]
    for name, template, tools in (("pt", PT, None), ("thinking", THINKING, TOOLS)):
        source = built_in_template(name)
        rendered, _ = render_jinja_template([chat], tools, chat_template=source)
        options = {"tools": tools, "add_generation_prompt": False}
        if name == "pt":
            rendered, _ = render_jinja_template(
                [chat], chat_template=source, add_generation_prompt=False
            )
        assert template.render(chat, **options) == rendered[0]
    blocks = "a\n  {% for m in messages %}\n  {{ m.content }}\n  {% break %}\n  {% endfor %}\nb\n"
    rendered, _ = render_jinja_template([chat], chat_template=blocks)
    assert ChatTemplate(blocks).render(chat) == rendered[0]


SPECIAL = ["<|end_of_sentence|>", "<|im_end|>", "</s>", "<tool_call>", "<mask:1>", "<think>"]
injected = st.lists(
    st.sampled_from([*SPECIAL, "a", " ", "\n", "\ufdd0", "\ufdd1", "<|im_", "end|>", "<"]),
    max_size=6,
).map("".join)


@given(text=injected)
def test_content_stays_text_in_pt(text: str, pt: Tokenizer):
    ids = PT.encode([{"role": "system", "content": text}, user(text), assistant(text)], pt)
    frame = [pt.token_id("<|begin_of_sentence|>"), pt.token_id("<|end_of_sentence|>")]
    assert [i for i in ids if pt.is_special(i)] == frame
    expected = f"<|begin_of_sentence|>{text}\nUser: {text}\nAssistant: {text}<|end_of_sentence|>"
    assert pt.decode(ids, skip_special_tokens=False) == expected + "Assistant: "
    plain = pt.encode(f"{text}\nUser: {text}\nAssistant: {text}", parse_special=False)
    assert ids[: len(plain) + 2] == [frame[0], *plain, frame[1]]


@given(text=injected)
def test_content_stays_text_in_thinking(text: str, thinking: Tokenizer):
    call = {"function": {"name": text, "arguments": {text: [text]}}}
    tools = [{"type": "function", "function": {"name": "f", "description": text}}]
    answer = assistant(text.replace("<think>", ""), thoughts=text, tool_calls=[call])
    tool = {"role": "tool", "content": text, "name": text}
    chat = [
        {"role": "system", "content": text},
        user([{"type": "text", "text": text}]),
        answer,
        tool,
    ]
    ids = THINKING.encode(chat, thinking, tools=tools, system_settings=text)
    rendered = THINKING.render(chat, tools=tools, system_settings=text)
    assert thinking.decode(ids, skip_special_tokens=False) == rendered
    harmless = [{**message, "content": "x"} for message in chat]
    harmless[2] |= {"thoughts": "x", "tool_calls": [{"function": {"name": "x", "arguments": {}}}]}
    safe = THINKING.encode(harmless, thinking, tools=[TOOLS[1]], system_settings="x")

    def tokens(ids: list[int]) -> list[int]:
        first_added = thinking.token_id("<|IMAGE_PLACEHOLDER|>")
        assert first_added is not None
        return [i for i in ids if thinking.is_special(i) or i >= first_added]

    if answer["content"]:
        assert tokens(ids) == tokens(safe)


def test_think_tags_of_an_assistant_stay_whole(thinking: Tokenizer):
    """Else the template could not see, and drop, the reasoning of earlier turns."""
    content = "<think>\nsecret\n</think>\n\nA <|im_end|>"
    ids = THINKING.encode([user("U"), assistant(content), user("V")], thinking)
    text = thinking.decode(ids, skip_special_tokens=False)
    assert "secret" not in text and "<response>\nA <|im_end|>\n</response>" in text
    assert ids.count(thinking.token_id("<|im_end|>")) == 4  # system, user, assistant, user


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        (["a", {"type": "text", "text": ""}], "a\n"),
    ],
)
def test_content_forms(content: object, expected: str):
    assert PT.render([user(content)]) == PT.render([user(expected)])


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a list with at least one"),
        ("hi", "messages: expected a list with at least one"),
        (None, "messages: expected a list with at least one"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([{"content": "hi"}], r"messages\[0\]\.role: expected a role"),
        ([user("a"), {"role": 5}], r"messages\[1\]\.role: expected a role"),
        ([user(5)], r"messages\[0\]\.content: expected a string or a list"),
        ([user([{"type": "text"}])], r"messages\[0\]\.content\[0\]\.text: expected a string"),
        ([user("a"), user(["b", IMAGE])], r"messages\[1\]\.content\[1\]: .*'image_url'"),
        ([assistant("a", reasoning=["b"])], r"messages\[0\]\.reasoning: expected a string"),
    ],
)
def test_bad_messages_are_named(messages, message: str, pt: Tokenizer):
    with pytest.raises(ValueError, match=message):
        PT.render(messages)
    with pytest.raises(ValueError, match=message):
        PT.encode(messages, pt)


def test_what_a_template_would_drop_is_refused(pt: Tokenizer, thinking: Tokenizer):
    tool = {"role": "tool", "content": "3"}
    call = assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])
    for dropped, message in (
        ({"messages": [user("a"), tool]}, r"messages\[1\]\.role: 'tool'"),
        ({"messages": [user("a"), call]}, r"messages\[1\]\.tool_calls"),
        ({"messages": [user("a")], "tools": TOOLS}, "tools: "),
        ({"messages": [user("a"), {"role": "critic", "content": "b"}]}, "'critic'"),
    ):
        with pytest.raises(ValueError, match=message):
            PT.render(**dropped)
        with pytest.raises(ValueError, match=message):
            PT.encode(**dropped, tokenizer=pt)
        if "critic" not in message:
            assert THINKING.encode(**dropped, tokenizer=thinking)
    assert PT.render([user("a"), assistant("b", tool_calls=[])], tools=[])
    with pytest.raises(ValueError, match="'critic'"):
        THINKING.render([user("a"), {"role": "critic", "content": "b"}])


def test_a_role_that_a_template_renders_is_accepted():
    chatml = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert chatml.render([{"role": "critic", "content": "b"}]) == "<critic>b"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system please') }}", "chat template: no system please"),
        ("{{ messages[0].content + 5 }}", "chat template: "),
        ("{{ missing.field }}", "chat template: 'missing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer than 16777216"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template: "),
    ],
)
def test_trouble_in_a_template_is_an_error_of_the_caller(source: str, message: str, pt: Tokenizer):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).encode([user("a")], pt)


def test_the_bound_counts_what_is_rendered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MAX_RENDERED_CHARS", 40)
    assert len(PT.render([user("")])) == 39
    with pytest.raises(ValueError, match="longer than 40 characters"):
        PT.render([user("ab")])


def test_input_that_is_not_plain_json(pt: Tokenizer, thinking: Tokenizer):
    with pytest.raises(ValueError, match="plain JSON"):
        PT.encode([user("a") | {"extra": object()}], pt)
    nested: list = []
    for _ in range(100):
        nested = [nested]
    tool = {"type": "function", "function": nested}
    with pytest.raises(ValueError, match="at most 64 deep"):
        THINKING.encode([user("a")], thinking, tools=[tool])
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="plain JSON"):
        THINKING.encode([user("a")], thinking, tools=[{"function": nested}])
    with pytest.raises(ValueError, match="lone surrogate"):
        PT.encode([user("\ud800")], pt)
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    every += "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    with pytest.raises(ValueError, match="every Unicode noncharacter"):
        PT.encode([user(every)], pt)
    assert pt.decode(PT.encode([user(every[1:])], pt)) == f"User: {every[1:]}\nAssistant: "


def test_which_template_is_used(pt_folder, thinking_folder, pt, thinking, tmp_path: Path):
    assert load_chat_template(pt_folder, pt).source == built_in_template("pt")
    assert load_chat_template(tmp_path, pt).source == built_in_template("pt")
    assert load_chat_template(tmp_path, thinking).source == built_in_template("thinking")
    config = {"chat_template": "from config {{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path, pt).render([user("a")]) == "from config </s>"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert load_chat_template(tmp_path, None).render([user("a")]) == "from file"
    shutil.copy(thinking_folder / "chat_template.jinja", tmp_path)
    assert load_chat_template(tmp_path, pt).source == built_in_template("thinking")


def test_no_template_is_an_error_at_use(tmp_path: Path, pt: Tokenizer):
    template = load_chat_template(tmp_path, None)
    with pytest.raises(ValueError, match="has no chat template"):
        template.render([user("a")])
    with pytest.raises(ValueError, match="has no chat template"):
        template.encode([user("a"), {"role": "tool", "content": "b"}], pt, tools=TOOLS)


def test_a_broken_template_is_named(tmp_path: Path, pt: Tokenizer):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% if %}"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: line 1"):
        load_chat_template(tmp_path, pt)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: expected a str"):
        load_chat_template(tmp_path, pt)
    (tmp_path / "chat_template.jinja").write_text("{{ a")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: line 1"):
        load_chat_template(tmp_path, pt)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        load_chat_template(tmp_path, pt)
