"""The built-in templates write the published formats, letter for letter."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from burnish.core.errors import TemplateError
from burnish.data import templates
from burnish.data.chat_template import ChatTemplate
from burnish.data.types import Message, ToolCall

TODAY = datetime.date(2025, 3, 9)
TALK = (Message("user", "Q1"), Message("assistant", "A1"), Message("user", "Q2"), Message("assistant", "A2"))
SYSTEM = Message("system", "S")
CALL = ToolCall("add", {"a": 1}, id="abcdefghi")
TOOL_TALK = (
    Message("user", "Q"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "1", tool_call_id="abcdefghi", name="add"),
    Message("assistant", "A"),
)
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LLAMA = "Cutting Knowledge Date: December 2023\nToday Date: "

FORMATS = {
    "alpaca": (f"<s>{ALPACA}\n\n### Instruction:\nQ1\n\n### Response:\nA1</s>\n\n### Instruction:\nQ2\n\n### Response:\nA2</s>"),
    "chatml": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "command-r": (
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q1<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A1<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A2<|END_OF_TURN_TOKEN|>"
    ),
    "deepseek-r1": "<s><｜User｜>Q1<｜Assistant｜>A1</s><｜User｜>Q2<｜Assistant｜>A2</s>",
    "deepseek-v2": "<s>User: Q1\n\nAssistant: A1</s>User: Q2\n\nAssistant: A2</s>",
    "deepseek-v3": "<s><｜User｜>Q1<｜Assistant｜>A1</s><｜User｜>Q2<｜Assistant｜>A2</s>",
    "gemma2": (
        "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n"
    ),
    "gemma3": (
        "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n"
    ),
    "granite3": (
        "<|start_of_role|>user<|end_of_role|>Q1<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>A1<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Q2<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>A2<|end_of_text|>\n"
    ),
    "llama2": "<s>[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "llama3.1": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA}26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "llama3.2": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA}09 Mar 2025\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "mistral-v1": "<s>[INST] Q1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
    "mistral-v3": "<s>[INST] Q1[/INST] A1</s>[INST] Q2[/INST] A2</s>",
    "mistral-v3-tekken": "<s>[INST]Q1[/INST]A1</s>[INST]Q2[/INST]A2</s>",
    "mistral-v7": "<s>[INST]Q1[/INST]A1</s>[INST]Q2[/INST]A2</s>",
    "olmo2": "<s><|user|>\nQ1\n<|assistant|>\nA1</s>\n<|user|>\nQ2\n<|assistant|>\nA2</s>",
    "phi3": "<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n</s>",
    "phi4": (
        "<|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant<|im_sep|>A1<|im_end|>"
        "<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>A2<|im_end|>"
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "qwen3": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>\n"
    ),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "tulu3": "<|user|>\nQ1\n<|assistant|>\nA1</s>\n<|user|>\nQ2\n<|assistant|>\nA2</s>",
    "vicuna": f"<s>{VICUNA} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "zephyr": "<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n",
}

GENERATION_PROMPTS = {
    "alpaca": "\n\n### Response:\n",
    "command-r": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "deepseek-r1": "<｜Assistant｜><think>\n",
    "deepseek-v2": "Assistant:",
    "deepseek-v3": "<｜Assistant｜>",
    "gemma2": "<start_of_turn>model\n",
    "gemma3": "<start_of_turn>model\n",
    "granite3": "<|start_of_role|>assistant<|end_of_role|>",
    "llama2": "",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.2": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-v1": "",
    "mistral-v3": "",
    "mistral-v3-tekken": "",
    "mistral-v7": "",
    "olmo2": "<|assistant|>\n",
    "phi3": "<|assistant|>\n",
    "phi4": "<|im_start|>assistant<|im_sep|>",
    "tulu3": "<|assistant|>\n",
    "vicuna": "ASSISTANT:",
    "zephyr": "<|assistant|>\n",
}

SYSTEMS = {
    "alpaca": "<s>S\n\n### Instruction:\nQ1",
    "command-r": "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q1",
    "deepseek-r1": "<s>S<｜User｜>Q1",
    "deepseek-v2": "<s>S\n\nUser: Q1",
    "deepseek-v3": "<s>S<｜User｜>Q1",
    "gemma3": "<s><start_of_turn>user\nS\n\nQ1",
    "granite3": "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Q1",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>",
    "llama3.1": f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA}26 Jul 2024\n\nS<|eot_id|>",
    "llama3.2": f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA}09 Mar 2025\n\nS<|eot_id|>",
    "mistral-v1": "<s>[INST] S\n\nQ1 [/INST]",
    "mistral-v3": "<s>[INST] Q1[/INST] A1</s>[INST] S\n\nQ2[/INST]",
    "mistral-v3-tekken": "<s>[INST]Q1[/INST]A1</s>[INST]S\n\nQ2[/INST]",
    "mistral-v7": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q1",
    "olmo2": "<s><|system|>\nS\n<|user|>\nQ1",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nQ1",
    "phi4": "<|im_start|>system<|im_sep|>S<|im_end|>",
    "tulu3": "<|system|>\nS\n<|user|>\nQ1",
    "vicuna": "<s>S USER: Q1",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ1",
}

TOOL_TURNS = {
    "deepseek-r1": (
        "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜></s>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜><｜tool▁outputs▁end｜>A</s>"
    ),
    "deepseek-v3": (
        "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜></s>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜><｜tool▁outputs▁end｜>A</s>"
    ),
    "granite3": (
        '<|start_of_role|>assistant<|end_of_role|><|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|end_of_text|>\n'
        "<|start_of_role|>tool_response<|end_of_role|>1<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>A<|end_of_text|>\n"
    ),
    "llama3.1": (
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"1"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>'
    ),
    "llama3.2": (
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"1"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>'
    ),
    "mistral-v3": (
        '[INST] Q[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS] {"content": "1", "call_id": "abcdefghi"}[/TOOL_RESULTS] A</s>'
    ),
    "mistral-v3-tekken": (
        '[INST]Q[/INST][TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS]{"content": "1", "call_id": "abcdefghi"}[/TOOL_RESULTS]A</s>'
    ),
    "mistral-v7": (
        '[INST]Q[/INST][TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>'
        "[TOOL_RESULTS]abcdefghi[TOOL_CONTENT]1[/TOOL_RESULTS]A</s>"
    ),
    "qwen2.5": (
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    ),
    "qwen3": (
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n"
    ),
}


def render(name: str, messages: tuple[Message, ...], tools: tuple[dict, ...] = (), *, ask: bool = False) -> str:
    template = ChatTemplate(templates.resolve(name), {"bos_token": "<s>", "eos_token": "</s>"}, TODAY)
    return str.__str__(template.render(messages, tools, add_generation_prompt=ask))


def test_every_template_has_its_format_here() -> None:
    assert sorted(FORMATS) == templates.names()


@pytest.mark.parametrize("name", templates.names())
def test_two_turns(name: str) -> None:
    assert render(name, TALK) == FORMATS[name]


@pytest.mark.parametrize("name", templates.names())
def test_generation_prompt_goes_after_the_question(name: str) -> None:
    prompt = GENERATION_PROMPTS.get(name, "<|im_start|>assistant\n")
    question = render(name, TALK[:1])
    asked = render(name, TALK[:1], ask=True)
    assert asked == question.removesuffix("</s>" if name == "phi3" else "") + prompt


@pytest.mark.parametrize("name", sorted(set(templates.names()) - {"gemma2"}))
def test_system_message(name: str) -> None:
    expected = SYSTEMS.get(name, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1")
    assert render(name, (SYSTEM, *TALK)).startswith(expected)


@pytest.mark.parametrize("name", sorted(TOOL_TURNS))
def test_tool_turns(name: str) -> None:
    text = render(name, TOOL_TALK, TOOLS)
    assert text.endswith(TOOL_TURNS[name])
    knows_definitions = not name.startswith(("deepseek", "mistral"))  # DeepSeek has no place for them, Mistral puts them last
    assert not knows_definitions or '"add"' in text.removesuffix(TOOL_TURNS[name])


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_thoughts_stay_after_the_last_question_only(name: str) -> None:
    talk = (TALK[0], Message("assistant", "A1", reasoning="R1"), TALK[2], Message("assistant", "A2", reasoning="R2"))
    text = render(name, talk)
    assert "R1" not in text
    assert "<think>\nR2\n</think>\n\nA2" in text


@pytest.mark.parametrize("name", ["llama2", "gemma2", "gemma3", "mistral-v1"])
def test_roles_out_of_order_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="must take turns"):
        render(name, (TALK[0], TALK[0]))


def test_resolve_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    assert templates.resolve(str(path)) == "{{ messages }}"


def test_resolve_names_the_nearest() -> None:
    with pytest.raises(TemplateError, match="did you mean 'chatml'"):
        templates.resolve("chatlm")


def test_resolve_lists_the_names_where_none_is_near() -> None:
    with pytest.raises(TemplateError, match="known: alpaca, chatml"):
        templates.resolve("zzzzzz")


def test_resolve_tells_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="cannot be read: No such file"):
        templates.resolve(str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TemplateError, match="not UTF-8"):
        templates.resolve(str(tmp_path / "bad.jinja"))
