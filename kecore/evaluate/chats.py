"""Reads chats: ``messages`` of roles and contents, ShareGPT's ``conversations``, Gemini's ``contents``, bare lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from kecore.evaluate.written import as_text

__all__ = ["Exchange", "is_chat", "read_chat"]

_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "function_call": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one side says in a chat.

    Args:
        role: ``user``, ``assistant``, ``system`` or ``tool``.
        text: empty where a turn only calls a tool.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Exchange:
    """The last reply of a chat, and what it replies to.

    Args:
        prompt: what the user says before the reply, or last where there is no reply; empty where the user says nothing.
        reply: empty where the chat has none.
        notes: the rest: what the system says, and the turns before, between and behind.
        roles: of all turns, for messages.
    """

    prompt: str = ""
    reply: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[str, ...] = ()


def is_chat(value: object) -> bool:
    """Return whether a value is a list of turns, each with a role and a content."""
    if not isinstance(value, list) or not value:
        return False
    return all(_is_turn(item) for item in cast("list[Any]", value))


def _is_turn(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    turn = cast("Mapping[str, Any]", value)
    role = turn.get("role", turn.get("from"))
    has_content = not turn.keys().isdisjoint(("content", "value", "parts", "tool_calls"))
    return isinstance(role, str) and role.casefold() in _ROLES and has_content


def read_chat(value: object, *, has_reply: bool = True) -> Exchange | None:
    """Return the last reply of a chat with what it replies to.

    Args:
        value: a list of turns, or a single turn.
        has_reply: the reply is in the chat; else it stands elsewhere, and the user has the last word.

    Returns:
        None where the value is no chat, or a turn holds something else than text, such as a picture.
    """
    items: list[Any] = [value] if _is_turn(value) else cast("list[Any]", value) if isinstance(value, list) else []
    if not is_chat(items):
        return None
    turns: list[Turn] = []
    for item in items:
        turn = _read_turn(item)
        if turn is None:
            return None
        turns.append(turn)
    return _last_exchange(turns, has_reply)


def _read_turn(turn: Mapping[str, Any]) -> Turn | None:
    role = _ROLES[str(turn.get("role", turn.get("from"))).casefold()]
    content = next((turn[name] for name in ("content", "value", "parts") if name in turn), None)
    if content is None or (role == "tool" and as_text(content) is None):
        return Turn(role, "")
    parts = cast("list[Any]", content) if isinstance(content, list) else [content]
    texts: list[str] = []
    for part in parts:
        # Contents may come in pieces, {"type": "text", "text": ...} each.
        text = as_text(cast("Mapping[str, Any]", part).get("text") if isinstance(part, Mapping) else part)
        if text is None:
            return None
        texts.append(text)
    return Turn(role, "\n".join(texts).strip())


def _last_exchange(turns: Sequence[Turn], has_reply: bool) -> Exchange:
    spoken = [turn for turn in turns if turn.role != "system"]
    replies = [index for index, turn in enumerate(spoken) if has_reply and turn.role == "assistant" and turn.text]
    reply = replies[-1] if replies else len(spoken)
    asked = [index for index in range(reply) if spoken[index].role == "user" and spoken[index].text]
    end = asked[-1] + 1 if asked else 0
    begin = end
    while begin > 0 and spoken[begin - 1].role == "user":
        begin -= 1  # what the user says in several turns is one prompt
    notes = {
        "system": "\n".join(turn.text for turn in turns if turn.role == "system"),
        "earlier turns": _written(spoken[:begin]),
        "turns between": _written(spoken[end:reply]),
        "later turns": _written(spoken[reply + 1 :]),
    }
    return Exchange(
        prompt="\n".join(turn.text for turn in spoken[begin:end]),
        reply=spoken[reply].text if replies else "",
        notes={name: text for name, text in notes.items() if text},
        roles=tuple(turn.role for turn in turns),
    )


def _written(turns: Sequence[Turn]) -> str:
    return "\n".join(f"{turn.role}: {turn.text}" for turn in turns if turn.text)
