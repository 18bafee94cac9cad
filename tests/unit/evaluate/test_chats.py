"""Chats as tools write them: contents in pieces, tools, several turns, preference pairs; and chats without a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kecore import load_records
from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, value: Any) -> EditRecord:
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    (record,) = load_records(path)
    return record


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("value", "notes"),
    [
        ({"messages": [user([{"type": "text", "text": "Who?"}]), assistant([{"type": "text", "text": "Ann"}])]}, {}),
        ({"messages": [{"role": "developer", "content": "Be brief"}, user("Who?"), assistant("Ann")]},
         {"system": "Be brief"}),
        ({"messages": [user("Who?"), CALL, {"role": "tool", "content": "x"}, assistant("Ann")]},
         {"turns between": "tool: x"}),
        ({"messages": [user("Hi"), assistant("Hello"), user("Who?"), assistant("Ann"), user("Thanks")]},
         {"earlier turns": "user: Hi\nassistant: Hello", "later turns": "user: Thanks"}),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": "{}"},
                            {"from": "observation", "value": "x"}, {"from": "gpt", "value": "Ann"}]},
         {"turns between": "tool: {}\ntool: x"}),
        ({"contents": [{"role": "user", "parts": [{"text": "Who?"}]}, {"role": "model", "parts": [{"text": "Ann"}]}]},
         {}),
        ([user("Who?"), assistant("Ann")], {}),
        ({"prompt": [user("Who?")], "completion": [assistant("Ann")]}, {}),
    ],
    ids=["pieces", "developer", "tools", "turns", "sharegpt-tools", "gemini", "no-name", "prompt-completion"],
)  # fmt: skip
def test_the_last_reply_is_the_target(tmp_path: Path, value: Any, notes: dict[str, str]) -> None:
    record = read(tmp_path, value)
    assert (record.request.text, record.request.target, dict(record.notes)) == ("Who?", "Ann", notes)


def test_what_a_user_says_in_several_turns_is_one_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, {"messages": [user("We mean Acme."), user("Who?"), assistant("Ann")]}).request.text == (
        "We mean Acme.\nWho?"
    )


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": [user("Who?")], "chosen": [assistant("Ann")], "rejected": [assistant("Bob")]},
        {"chosen": [user("Who?"), assistant("Ann")], "rejected": [user("Who?"), assistant("Bob")]},
        {"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Ann"},
         "rejected": {"from": "gpt", "value": "Bob"}},
    ],
)  # fmt: skip
def test_pairs_of_preferences(tmp_path: Path, value: Any) -> None:
    request = read(tmp_path, value).request
    assert (request.text, request.target, request.ground_truth) == ("Who?", "Ann", "Bob")


def test_a_list_of_chats(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([[user("Who?"), assistant("Ann")], [user("Where?"), assistant("Rome")]]))
    assert [request.target for request in load_records(path).requests] == ["Ann", "Rome"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"messages": [{"role": "system", "content": "s"}, assistant("Ann")]}, "got the roles system, assistant"),
        ({"messages": [user("Who?")]}, "expected a reply of the assistant to something that the user says"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("Ann")]},
         "'messages' holds something else than text"),
    ],
)  # fmt: skip
def test_chats_without_a_fact(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        read(tmp_path, value)
