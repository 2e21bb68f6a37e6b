"""The forms of rows: what is prompt and what is answer in each, and what is wrong with bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from imsm_core.data.forms import Fields, Turn, find_form
from imsm_core.data.readers import BadRow, Row

NONE = Fields()
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MORE, DONE = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}


def turns(row: Row, fields: Fields = NONE) -> list[Turn]:
    return find_form(row, fields).turns(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "answer": "a", "id": 3}, [Turn("p", "a")]),
        ({"prompt": "p", "completion": "c"}, [Turn("p", "c")]),
        ({"prompt": [ASK], "completion": [SAY]}, [Turn([ASK], "Hello")]),
        ({"prompt": [SYSTEM, ASK], "completion": "c"}, [Turn([SYSTEM, ASK], "c")]),
        ({"prompt": "Hi", "completion": [SAY]}, [Turn([ASK], "Hello")]),
        ({"prompt": [ASK, SAY, MORE], "answer": [DONE]}, [Turn([ASK, SAY, MORE], "See you")]),
        ({"instruction": "Add", "output": "3"}, [Turn("Add", "3")]),
        ({"instruction": "Add", "input": "", "output": "3"}, [Turn("Add", "3")]),
        ({"instruction": "Add", "input": None, "output": "3"}, [Turn("Add", "3")]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [Turn("Add\n\n1 2", "3")]),
        ({"messages": [ASK, SAY]}, [Turn([ASK], "Hello")]),
        ({"messages": [SYSTEM, ASK, SAY]}, [Turn([SYSTEM, ASK], "Hello")]),
        (
            {"messages": [ASK, SAY, MORE, DONE, ASK]},
            [Turn([ASK], "Hello"), Turn([ASK, SAY, MORE], "See you")],
        ),
        ({"messages": [SAY, ASK, DONE]}, [Turn([SAY, ASK], "See you")]),
        (
            {"messages": [ASK, SAY | {"weight": 0}, MORE, DONE | {"weight": 1}]},
            [Turn([ASK, SAY | {"weight": 0}, MORE], "See you")],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            [Turn([ASK], "Hello")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "system": "Be brief.",
            },
            [Turn([SYSTEM, ASK], "Hello")],
        ),
        ({"conversations": [ASK, SAY]}, [Turn([ASK], "Hello")]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
                ]
            },
            [Turn([ASK], "Hello")],
        ),
    ],
    ids=range(19),
)
def test_every_form_gives_prompts_and_answers(row: Row, expected: list[Turn]) -> None:
    assert turns(row) == expected


def test_text_alone_is_plain_text() -> None:
    form = find_form({"text": "Once", "id": 1}, NONE)
    assert form.name == "text"
    assert form.text({"text": "upon"}) == "upon"


def test_fields_that_are_given_win_over_the_known_forms() -> None:
    row: Row = {"prompt": "p", "answer": "a", "instruction": "i", "output": "o", "text": "t", "messages": [ASK, SAY]}
    assert turns(row, Fields("instruction", "output")) == [Turn("i", "o")]
    assert turns(row, Fields("text")) == [Turn("t", "a")]
    assert turns(row, Fields(None, "output")) == [Turn("p", "o")]
    assert turns({"question": "q", "completion": "c"}, Fields("question")) == [Turn("q", "c")]
    with pytest.raises(BadRow, match=r"^it has no field ''; it has 'prompt'"):
        turns(row, Fields(""))
    with pytest.raises(BadRow, match=r"^it has no field 'question'; it has 'messages'$"):
        turns({"messages": [ASK, SAY]}, Fields("question"))


def test_fields_that_are_only_expected_give_way_to_a_known_form() -> None:
    expected = Fields("question", "reply", required=False)
    assert turns({"question": "q", "reply": "r"}, expected) == [Turn("q", "r")]
    assert turns({"messages": [ASK, SAY]}, expected) == [Turn([ASK], "Hello")]


def read(row: Row) -> str | list[Turn]:
    form = find_form(row, NONE)
    return form.text(row) if form.name == "text" else form.turns(row)


def bad(row: dict[str, Any], reason: str, message: str) -> Any:
    return pytest.param(row, reason, message, id=message[:40])


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        bad({"a": 1}, "unknown form", "no form is known that has 'a'; it needs 'messages'"),
        bad({}, "unknown form", "no form is known that has none"),
        bad({"prompt": "p", "answer": None}, "null", "field 'answer' is null, not text"),
        bad({"prompt": 3, "answer": "a"}, "not text", "field 'prompt' is a number, not text"),
        bad({"prompt": " \n", "answer": "a"}, "empty field", "field 'prompt' is empty"),
        bad({"prompt": "p", "answer": ""}, "empty field", "field 'answer' is empty"),
        bad({"prompt": "\ud83d", "answer": "a"}, "not Unicode text", "field 'prompt' is not Unicode text"),
        bad({"prompt": [ASK], "completion": None}, "not messages", "field 'completion' is null, not a list of mess"),
        bad({"prompt": [ASK], "completion": [ASK]}, "no answer", "field 'completion' has no turn of the assistant"),
        bad({"instruction": "", "output": "o"}, "empty field", "field 'instruction' is empty"),
        bad({"instruction": "i", "input": 3, "output": "o"}, "not text", "field 'input' is a number, not text"),
        bad({"messages": None}, "not messages", "field 'messages' is null, not a list of messages"),
        bad({"messages": []}, "empty field", "field 'messages' has no messages"),
        bad({"messages": ["Hi"]}, "not messages", "field 'messages', turn 1 is text, not a message"),
        bad(
            {"messages": [{"role": "user"}]}, "not messages", "field 'messages', turn 1 has no 'content'; it has 'role'"
        ),
        bad({"messages": [ASK]}, "no answer", "no turn of a user is followed by one of the assistant"),
        bad({"messages": [SAY]}, "no answer", "no turn of a user is followed by one of the"),
        bad({"messages": [ASK, {"role": "assistant", "content": " "}]}, "empty answer", "turn 2, of the assistant, is"),
        bad({"messages": [ASK, {"role": "assistant", "content": None}]}, "null", "field 'messages', turn 2 is null"),
        bad(
            {"messages": [{"role": "wizard", "content": ""}]}, "unknown role", "turn 1 has the role 'wizard'; roles are"
        ),
        bad({"messages": [{"role": [1], "content": ""}]}, "not text", "turn 1, 'role' is a list, not text"),
        bad(
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text", "has a part that is not text"
        ),
        bad(
            {"messages": [ASK, SAY | {"tool_calls": [{}]}]},
            "tools",
            "turn 2 has 'tool_calls'; conversations with tools",
        ),
        bad({"messages": [ASK, SAY], "tools": [{}]}, "tools", "it has 'tools'; conversations with tools cannot be"),
        bad({"text": ["a"]}, "not text", "field 'text' is a list, not text"),
        bad({"text": ""}, "empty field", "field 'text' is empty"),
    ],
)
def test_bad_row_says_what_is_wrong(row: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(row)
    assert message in str(caught.value)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_row_of_another_form_than_the_first_is_bad() -> None:
    with pytest.raises(BadRow, match="it has no field 'prompt'; it has 'messages'"):
        find_form({"prompt": "p", "answer": "a"}, NONE).turns({"messages": [ASK, SAY]})
