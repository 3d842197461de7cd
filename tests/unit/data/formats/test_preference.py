from __future__ import annotations

import json
from typing import Any

import pytest

from burnish.core.errors import FormatError
from burnish.data.types import Completion, Conversation, Message, Pair, ToolCall

from .converting import convert, malformed


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def human(value: str) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


SYSTEM = {"role": "system", "content": "s"}


def pair(fields: dict[str, Any], **settings: Any) -> Pair:
    item = convert(fields, "preference", **settings)
    assert isinstance(item, Pair)
    return item


def turns(fields: dict[str, Any], **settings: Any) -> tuple[str, str, str]:
    """(prompt, chosen, rejected), each like `user:a assistant:b`; checks that the prompt is shared and masked, and the answers are not."""
    item = pair(fields, **settings)
    assert isinstance(item.chosen, Conversation) and isinstance(item.rejected, Conversation)
    sides = item.chosen.messages, item.rejected.messages
    lengths = [next((i for i, m in enumerate(side) if m.train is not False), len(side)) for side in sides]
    assert all(m.train is None for side, length in zip(sides, lengths, strict=True) for m in side[length:])
    prompts = [side[:length] for side, length in zip(sides, lengths, strict=True)]
    assert prompts[0] == prompts[1]
    return said(prompts[0]), said(sides[0][lengths[0] :]), said(sides[1][lengths[1] :])


def said(messages: tuple[Message, ...]) -> str:
    return " ".join(f"{m.role}:{m.content}" for m in messages)


# -- texts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("chosen", "rejected"),
        ("chosen_response", "rejected_response"),
        ("response_chosen", "response_rejected"),
        ("chosen_answer", "rejected_answer"),
        ("answer_chosen", "answer_rejected"),
    ],
)
@pytest.mark.parametrize("prompt", ["prompt", "question", "input"])
def test_texts_stay_as_they_are(prompt: str, chosen: str, rejected: str) -> None:
    fields = {prompt: "Q: ", chosen: " A\n", rejected: " B", "id": 1}
    assert pair(fields) == Pair(Completion("Q: ", " A\n"), Completion("Q: ", " B"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not in the middle of a word
        ("What?\nThis.", "What?\nThat.", "What?\n"),
        ("What?\n This.", "What?\n That.", "What?\n"),
        ("a b", "a b c", "a"),
        ("a b", "a b", "a"),
        ("one", "other", ""),
        ("", "other", ""),
    ],
)
def test_texts_without_a_prompt_share_the_beginning(chosen: str, rejected: str, prompt: str) -> None:
    length = len(prompt)
    assert pair({"chosen": chosen, "rejected": rejected}) == Pair(
        Completion(prompt, chosen[length:]), Completion(prompt, rejected[length:])
    )


def test_a_system_column_makes_texts_a_conversation() -> None:
    for prompt in ("question", "input", "prompt"):
        fields = {"system": "s", prompt: "a", "chosen": "b", "rejected": "c"}
        assert turns(fields) == ("system:s user:a", "assistant:b", "assistant:c")
        assert turns({**fields, "system": ""}) == ("user:a", "assistant:b", "assistant:c")
        assert turns({**fields, "system": None}, system="d")[0] == "system:d user:a"


def test_a_system_prompt_has_no_place_in_texts() -> None:
    with pytest.raises(FormatError, match="a system prompt needs a conversation, but the answers are plain texts here") as caught:
        convert({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", system="s")
    assert caught.value.hint is not None and "'columns: {instruction: prompt}'" in caught.value.hint
    mapped = turns({"prompt": "a", "chosen": "b", "rejected": "c"}, system="s", columns={"instruction": "prompt"})
    assert mapped == ("system:s user:a", "assistant:b", "assistant:c")
    with pytest.raises(FormatError, match="needs a conversation"):
        convert({"system": "s", "chosen": "a b", "rejected": "a c"}, "preference")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, ("user:a", "assistant:b", "assistant:c")),
        (
            {"instruction": "a", "input": "x", "system": "s", "history": [["p", "q"]], "chosen": "b", "rejected": "c"},
            ("system:s user:p assistant:q user:a\nx", "assistant:b", "assistant:c"),
        ),
        ({"instruction": "a", "input": "", "output": ["b", "c"]}, ("user:a", "assistant:b", "assistant:c")),
        ({"instruction": "a", "output": '["b", "c"]'}, ("user:a", "assistant:b", "assistant:c")),
    ],
)
def test_an_instruction_is_a_user_turn(fields: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert turns(fields) == expected


# -- conversations ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
        {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]},
        {"prompt": [user("a")], "chosen": bot("b"), "rejected": bot("c")},
        {"prompt": user("a"), "chosen": bot("b"), "rejected": "c"},
        {"prompt": "a", "chosen": [bot("b")], "rejected": [bot("c")]},
        {"prompt": json.dumps([user("a")]), "chosen": json.dumps([bot("b")]), "rejected": json.dumps(bot("c"))},
        {"conversations": [human("a")], "chosen": gpt("b"), "rejected": gpt("c")},
        {"conversations": [human("a")], "chosen": bot("b"), "rejected": "c"},
        {"conversation": [user("a")], "chosen": bot("b"), "rejected": bot("c")},
        {"messages": [user("a")], "chosen": bot("b"), "rejected": bot("c")},
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"chosen": [human("a"), gpt("b")], "rejected": [human("a"), gpt("c")]},
        {"prompt": None, "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"prompt": "a", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"prompt": " a\n", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"prompt": [user("a")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"prompt": "s\na", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"messages": [user("a"), bot("b")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"prompt": "a", "messages": [user("a"), bot("b")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
    ],
)
def test_ways_to_write_the_same_pair(fields: dict[str, Any]) -> None:
    assert turns(fields) == ("user:a", "assistant:b", "assistant:c")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (  # only what differs is compared
            {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("c"), bot("e")]},
            ("user:a assistant:b user:c", "assistant:d", "assistant:e"),
        ),
        (  # from where the conversations part
            {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("x"), user("c"), bot("e")]},
            ("user:a", "assistant:b user:c assistant:d", "assistant:x user:c assistant:e"),
        ),
        (  # of unequal length
            {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b"), user("c"), bot("d")]},
            ("user:a", "assistant:b", "assistant:b user:c assistant:d"),
        ),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b")]}, ("user:a", "assistant:b", "assistant:b")),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("x"), bot("c")]}, ("", "user:a assistant:b", "user:x assistant:c")),
        (  # the prompt repeats the first turn only
            {"prompt": "a", "chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("c"), bot("e")]},
            ("user:a assistant:b user:c", "assistant:d", "assistant:e"),
        ),
        (  # the prompt repeats the last turn only
            {"prompt": "c", "chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("c"), bot("e")]},
            ("user:a assistant:b user:c", "assistant:d", "assistant:e"),
        ),
        (
            {"prompt": "a", "chosen": [SYSTEM, user("a"), bot("b")], "rejected": [SYSTEM, user("a"), bot("c")]},
            ("system:s user:a", "assistant:b", "assistant:c"),
        ),
        (  # the answers begin with the end of the prompt
            {"prompt": [SYSTEM, user("a")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
            ("system:s user:a", "assistant:b", "assistant:c"),
        ),
        (
            {"prompt": [SYSTEM], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
            ("system:s user:a", "assistant:b", "assistant:c"),
        ),
        (  # one answer repeats the prompt, the other does not
            {"prompt": "a", "chosen": [user("a"), bot("b")], "rejected": "c"},
            ("user:a", "assistant:b", "assistant:c"),
        ),
        (  # an answer may go on after a prompt that ends with an answer
            {"prompt": [user("a"), bot("b")], "chosen": [user("c"), bot("d")], "rejected": [user("c"), bot("e")]},
            ("user:a assistant:b", "user:c assistant:d", "user:c assistant:e"),
        ),
        (  # what a separate prompt leaves to the answers is compared, even where they share it
            {"prompt": "a", "chosen": [bot("b"), user("c"), bot("d")], "rejected": [bot("b"), user("c"), bot("e")]},
            ("user:a", "assistant:b user:c assistant:d", "assistant:b user:c assistant:e"),
        ),
        ({"chosen": [bot("b")], "rejected": [bot("c")]}, ("", "assistant:b", "assistant:c")),
    ],
)
def test_where_the_prompt_ends(fields: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert turns(fields) == expected


def test_transcripts_are_read_as_conversations() -> None:
    front = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant:"
    assert turns({"chosen": f"{front} e", "rejected": f"{front} f\n\ng"}) == (
        "user:a assistant:b user:c\nd",
        "assistant:e",
        "assistant:f\n\ng",
    )
    assert turns({"chosen": f"{front} e", "rejected": front}, system="s")[0] == "system:s user:a assistant:b user:c\nd"
    assert convert({"chosen": front, "rejected": f"{front}  "}, "preference") is None
    said = "to Human: and Assistant: he said"
    assert turns({"chosen": f"Human: {said}\n\nAssistant: b", "rejected": f"Human: {said}\n\nAssistant: c"})[0] == f"user:{said}"


def test_transcripts_beside_a_prompt() -> None:
    prompt = "\n\nHuman: a\n\nAssistant:"
    fields = {"prompt": prompt, "chosen": " b", "rejected": " c"}
    assert pair(fields) == Pair(Completion(prompt, " b"), Completion(prompt, " c"))
    whole = {"prompt": prompt, "chosen": f"{prompt} b", "rejected": f"{prompt} c"}
    assert turns(whole) == ("user:a", "assistant:b", "assistant:c")


def test_text_that_only_looks_like_json_stays_text() -> None:
    for text in ('["b"]', '{"b": 1}', "[b", "{}", "[]"):
        assert pair({"prompt": "a", "chosen": text, "rejected": "c"}).chosen == Completion("a", text)


def test_system_tools_and_calls() -> None:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "tool", "content": "r", "tool_call_id": "1"}
    item = pair(
        {
            "system": "s",
            "tools": [{"name": "f"}],
            "prompt": [user("a")],
            "chosen": [bot("", tool_calls=[call]), result, bot("b")],
            "rejected": [{"from": "function_call", "value": '{"name": "g", "arguments": {}}'}],
        }
    )
    assert isinstance(item.chosen, Conversation) and isinstance(item.rejected, Conversation)
    assert item.chosen.tools == item.rejected.tools == ({"name": "f"},)
    assert [m.train for m in item.chosen.messages] == [False, False, None, None, None]
    assert item.chosen.messages[2].tool_calls == (ToolCall("f", {"x": 1}, "1"),)
    assert item.rejected.messages[:2] == item.chosen.messages[:2]
    assert item.rejected.messages[2].tool_calls == (ToolCall("g", {}),)


def test_rows_as_openai_has_them() -> None:
    fields = {
        "input": {"messages": [user("a")], "tools": [{"name": "f"}], "parallel_tool_calls": True},
        "preferred_output": [bot("b")],
        "non_preferred_output": [bot("c")],
    }
    assert turns(fields) == ("user:a", "assistant:b", "assistant:c")
    item = pair(fields)
    assert isinstance(item.chosen, Conversation) and item.chosen.tools == ({"name": "f"},)
    fields["input"] = {"messages": [{"role": "usr", "content": "a"}]}
    assert malformed(fields, "preference").startswith("field 'input.messages[0].role': unknown role 'usr'")


def test_what_rows_say_about_training_stays_in_the_answers() -> None:
    front = [user("a"), bot("x", train=True), user("c")]
    item = pair({"chosen": [*front, bot("b", weight=0.5)], "rejected": [*front, bot("d", train=True)]})
    assert isinstance(item.chosen, Conversation) and isinstance(item.rejected, Conversation)
    assert [m.train for m in item.chosen.messages] == [False, False, False, 0.5]
    assert [m.train for m in item.rejected.messages] == [False, False, False, True]


def test_keys_and_roles_of_the_run_file() -> None:
    fields = {"talk": [{"who": "jane", "says": "a"}], "better": {"who": "bot", "says": "b"}, "worse": {"who": "bot", "says": "c"}}
    columns = {"prompt": "talk", "chosen": "better", "rejected": "worse", "role": "who", "content": "says"}
    assert turns(fields, columns=columns, roles={"jane": "user"}) == ("user:a", "assistant:b", "assistant:c")


# -- margins, weights, blanks ---------------------------------------------------------------------------------------------------------

TEXTS: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_margin_and_weight() -> None:
    assert (pair(TEXTS).margin, pair(TEXTS).weight) == (0.0, 1.0)
    item = pair({**TEXTS, "margin": -0.5, "weight": 2})
    assert (item.margin, item.weight) == (-0.5, 2.0)
    item = pair({**TEXTS, "margin": "1.5", "weight": " "})  # CSV cells
    assert (item.margin, item.weight) == (1.5, 1.0)
    item = pair({**TEXTS, "margin": None, "weight": float("nan")})
    assert (item.margin, item.weight) == (0.0, 1.0)
    talk = {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")], "margin": 3, "weight": 0}
    assert (pair(talk).margin, pair(talk).weight) == (3.0, 0.0)


def test_scores_are_a_margin_only_where_they_are_mapped() -> None:
    fields = {**TEXTS, "score_chosen": 8.5, "score_rejected": 6}
    assert pair(fields).margin == 0.0
    assert pair(fields, columns={"score_chosen": "score_chosen", "score_rejected": "score_rejected"}).margin == 2.5
    assert pair(fields, columns={"margin": "score_chosen"}).margin == 8.5


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "chosen": "", "rejected": " "},
        {"instruction": "a", "chosen": "", "rejected": ""},
        {"prompt": "a", "chosen": [bot("")], "rejected": [bot(" ")]},
        {"chosen": [user("a"), bot("x"), user("b"), bot("")], "rejected": [user("a"), bot("x"), user("b"), bot("")]},
        {"chosen": " ", "rejected": ""},
    ],
)
def test_rows_without_an_answer_are_empty(fields: dict[str, Any]) -> None:
    assert convert(fields, "preference") is None


def test_one_answer_may_be_blank() -> None:
    assert pair({"prompt": "a", "chosen": "b", "rejected": ""}).rejected == Completion("a", "")
    assert turns({"prompt": [user("a")], "chosen": "", "rejected": "c"}) == ("user:a", "assistant:", "assistant:c")


def test_equal_answers_are_kept() -> None:
    item = pair({"prompt": "a", "chosen": "b", "rejected": "b"})
    assert item.chosen == item.rejected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected': expected text, found null"),
        ({"prompt": "a", "chosen": 7, "rejected": "c"}, "field 'chosen': expected text, found the number 7"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "field 'prompt': expected text, found null"),
        ({"question": 5, "chosen": "b", "rejected": "c"}, "field 'question': expected text, found the number 5"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "field 'chosen': the conversation is empty"),
        (
            {"prompt": "a", "chosen": ["b"], "rejected": "c"},
            "field 'chosen[0]': expected a message with 'role' and 'content', found the text 'b'",
        ),
        (
            {"prompt": "a", "chosen": [bot("b")], "rejected": [bot("c"), user("d")]},
            "field 'rejected': the answer ends with a user message, expected an assistant turn",
        ),
        (
            {"conversations": [human("a")], "chosen": human("b"), "rejected": gpt("c")},
            "field 'chosen': the answer ends with a user message, expected an assistant turn",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "field 'chosen': the answer ends with a user message, expected an assistant turn",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
            "field 'rejected': expected a dialogue with 'Human:' and 'Assistant:', like the other answer",
        ),
        (
            {"prompt": "x", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
            "field 'chosen': the answer begins with a user message, but nothing in it repeats the prompt",
        ),
        (
            {"messages": [user("a"), bot("b")], "chosen": "b", "rejected": "c"},
            "field 'messages': the prompt ends with an assistant turn, so nothing is left to answer",
        ),
        (
            {"prompt": [user("a")], "chosen": [bot("b"), SYSTEM, bot("c")], "rejected": "c"},
            "message 3 is a system message, which may only come first",
        ),
        ({"instruction": "a", "output": ["b"]}, "field 'output': expected [chosen, rejected], found a list of 1"),
        ({"instruction": "a", "output": "b"}, "field 'output': expected JSON, found 'b' (expecting value at character 1)"),
        ({"instruction": "a", "output": 7}, "field 'output': expected [chosen, rejected], found the number 7"),
        ({**TEXTS, "margin": "much"}, "field 'margin': expected a finite number, found the text 'much'"),
        ({**TEXTS, "margin": True}, "field 'margin': expected a finite number, found true"),
        ({**TEXTS, "margin": float("inf")}, "field 'margin': expected a finite number, found the number inf"),
        ({**TEXTS, "weight": -1}, "field 'weight': expected a number of 0 or more, found the number -1"),
    ],
)
def test_malformed_rows(fields: dict[str, Any], message: str) -> None:
    assert malformed(fields, "preference") == message


def test_half_of_the_scores() -> None:
    said = malformed({**TEXTS, "score_chosen": 1}, "preference", columns={"score_chosen": "score_chosen"})
    assert said == "field 'score_chosen': a margin needs both scores, but only one is mapped"
    both = {"score_chosen": "good", "score_rejected": "bad"}
    said = malformed({**TEXTS, "good": 1, "bad": None}, "preference", columns=both)
    assert said == "field 'bad': the score is missing, which the margin needs"
