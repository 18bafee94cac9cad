"""kecore's own layout, and whatever people write for an editing tool, read as it.

A field may have the name that any tool of the field gives it (:data:`~kecore_datasets.own_names.TABLE`). Instructions,
chats and pairs of preferences become a prompt and a target. What has no meaning here is kept as a note of the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord
from kecore.evaluate.chats import Exchange, is_chat, read_chat
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.own_layout import read_record
from kecore.evaluate.written import as_text
from kecore_datasets import own_shapes as shapes
from kecore_datasets.own_names import TABLE, fold_name, refuse_slips

__all__ = ["OWN", "NamedFields", "name_fields"]

_CHATS = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog")
_CHOICES = ("choices", "options", "candidates", "endings")
_SURE_TARGETS = ("target_new", "new_target", "new_answer", "target")
_NUMBERED = re.compile(r"(?:re|para)phrase(?:_prompt|d_prompt)?_?\d+")
_ROW_NUMBER = re.compile(r"unnamed_\d+")
"""How pandas calls a column of row numbers that has no name in a file, folded."""


@dataclass
class NamedFields:
    """An object's fields by the names of kecore's own layout.

    Args:
        object: the object.
        where: its place, for messages.
        unread: the fields that have not been read, by their folded names.
        values: what was read, by field of the own layout.
        origins: the object's fields that it was read from.
        notes: what has no meaning in the own layout.
    """

    object: Mapping[str, Any]
    where: str
    unread: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, candidates: Sequence[str]) -> bool:
        """Read the first of these fields that is there as a field of the own layout, unless that was read before."""
        folded = next((candidate for candidate in candidates if candidate in self.unread), None)
        if folded is None or name in self.values:
            return False
        self.origins[name] = self.unread.pop(folded)
        self.values[name] = self.object[self.origins[name]]
        return True

    def as_record(self) -> dict[str, Any]:
        """Return an object of the own layout."""
        notes = {str(name): _note_text(note) for name, note in self.notes.items()}
        return {**self.values, "notes": notes} if notes else dict(self.values)


def name_fields(object: Mapping[str, Any], where: str = "") -> NamedFields:
    """Find out which field of an object is which field of kecore's own layout.

    Args:
        object: the object.
        where: its place, for messages.

    Raises:
        DataFormatError: two names differ in case or punctuation only, a field is probably misspelt, a value has another
            shape than its name says, there are two targets, or a chat has no reply.
    """
    named = NamedFields(object, where)
    _list_unread(named)
    _read_chat_field(named)
    _read_instruction(named)
    for own in TABLE.values():  # its own names come first, and mean what they say
        named.take(own.name, [own.name])
    for own in TABLE.values():
        named.take(own.name, own.others)
    for own in TABLE.values():
        named.take(own.name, own.rather)
    _read_chats_in_fields(named)
    _read_flat_probes(named)
    _read_numbered_rephrases(named)
    _refuse_second_targets(named)
    _bring_into_shape(named)
    _refuse_number_of_choice(named)
    refuse_slips(named.unread, named.values, where)
    own_notes = named.values.pop("notes", None)
    named.notes |= own_notes if isinstance(own_notes, Mapping) else {"notes": own_notes} if own_notes else {}
    named.notes |= {name: object[name] for name in named.unread.values()}
    for name in ("prompt", "target"):  # one that is there and holds nothing has an error of its own
        if name not in named.values and any(fold_name(key) in TABLE[name].names for key in object):
            named.values[name] = None
    return named


def _list_unread(named: NamedFields) -> None:
    """Begin with all fields that hold something."""
    for name, value in named.object.items():
        folded = fold_name(name)
        is_blank_id = folded in TABLE["id"].names and isinstance(value, str) and not value.strip()
        is_row_number = _ROW_NUMBER.fullmatch(folded) and (as_text(value) or "").isdecimal()
        if _is_missing(value) or is_blank_id or is_row_number:
            continue
        if folded in named.unread:
            raise DataFormatError(
                f"{named.where}: the fields '{named.unread[folded]}' and '{name}' have one name; rename one"
            )
        named.unread[folded] = name


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _read_chat_field(named: NamedFields) -> None:
    """Read a chat, such as OpenAI's ``messages``: its last reply, and what it replies to."""
    name = next((name for name in _CHATS if name in named.unread), None)
    if name is None:
        return
    value = named.object[named.unread[name]]
    exchange = read_chat(value)
    if exchange is None:
        if is_chat(value):
            raise DataFormatError(f"{named.where}: '{name}' holds something else than text; facts are texts")
        return
    chat = named.unread.pop(name)
    is_answered_elsewhere = any(candidate in named.unread for candidate in TABLE["target"].names)
    if not exchange.prompt or not (exchange.reply or is_answered_elsewhere):
        raise DataFormatError(
            f"{named.where}: expected a reply of the assistant to something that the user says in '{chat}', got the "
            f"roles {', '.join(exchange.roles)}"
        )
    _take_prompt(named, exchange, chat)
    if exchange.reply:
        named.values["target"], named.origins["target"] = exchange.reply, chat


def _take_prompt(named: NamedFields, exchange: Exchange, chat: str) -> None:
    named.values["prompt"], named.origins["prompt"] = exchange.prompt, chat
    named.notes |= exchange.notes


def _read_instruction(named: NamedFields) -> None:
    """Read alpaca's ``instruction`` with its ``input`` behind it."""
    if "instruction" not in named.unread or "prompt" in named.values:
        return
    present = [name for name in ("instruction", "input") if name in named.unread]
    texts = [as_text(named.object[named.unread[name]]) for name in present]
    if any(text is None for text in texts):
        return  # no text, which is said where the record is read
    names = [named.unread.pop(name) for name in present]
    named.values["prompt"] = "\n".join(text.strip() for text in texts if text and text.strip())
    named.origins["prompt"] = " and ".join(names)


def _read_chats_in_fields(named: NamedFields) -> None:
    """Read prompts and answers that are chats themselves, as in preference data."""
    prompt = read_chat(named.values.get("prompt"), has_reply=False)
    if prompt is not None:
        _take_prompt(named, prompt, named.origins["prompt"])
    for name in ("target", "ground_truth"):
        exchange = read_chat(named.values.get(name))
        if exchange is None:
            continue
        named.values[name] = exchange.reply
        if "prompt" not in named.values and exchange.prompt:
            _take_prompt(named, exchange, named.origins[name])


def _read_flat_probes(named: NamedFields) -> None:
    """Read EasyEdit's flat probes: ``locality_prompt`` with ``locality_ground_truth``, and those of portability."""
    for kind, axis in (("locality", "neighbourhood"), ("portability", "one_hop")):
        prompt = next((name for name in (f"{kind}_prompt", f"{kind}_question") if name in named.unread), None)
        if kind in named.values or prompt is None:
            continue
        names = [named.unread.pop(prompt)]
        answer = next((name for name in (f"{kind}_ground_truth", f"{kind}_answer") if name in named.unread), None)
        if answer is not None:
            names.append(named.unread.pop(answer))
        answers = None if answer is None else named.object[names[-1]]
        named.values[kind] = shapes.flat_probes(named.object[names[0]], answers, axis)
        named.origins[kind] = " and ".join(names)


def _read_numbered_rephrases(named: NamedFields) -> None:
    """Read columns such as ``rephrase_1`` and ``paraphrase 2`` as one list."""
    numbered = sorted(name for name in named.unread if _NUMBERED.fullmatch(name))
    if not numbered or "rephrases" in named.values:
        return
    names = [named.unread.pop(name) for name in numbered]
    named.values["rephrases"] = [named.object[name] for name in names]
    named.origins["rephrases"] = " and ".join(names)


def _refuse_second_targets(named: NamedFields) -> None:
    """Refuse an object that names two targets, of which one may be the old answer."""
    if "target" not in named.origins:
        return
    mine = named.origins["target"]
    for folded in _SURE_TARGETS:
        other = named.unread.get(folded)
        if other is None:
            continue
        first, second = shapes.texts(named.values["target"]), shapes.texts(named.object[other])
        if second and first != second:
            raise DataFormatError(
                f"{named.where}: '{mine}' is {first[:1]} and '{other}' is {second[:1]}; say which is the target and "
                f"which the old answer, as --map target={other},ground_truth={mine}"
            )


def _bring_into_shape(named: NamedFields) -> None:
    """Bring values into the shapes of the own layout; further answers are aliases."""
    for name, value in list(named.values.items()):
        try:
            shaped = TABLE[name].shape(value)
        except ValueError as error:
            raise DataFormatError(f"{named.where}: field '{name}' must be {error}, got {value!r:.80}") from None
        named.values[name] = shaped
    for name, aliases in (("target", "target_aliases"), ("ground_truth", "truth_aliases")):
        texts = named.values.pop(name, [])
        if texts:
            named.values[name] = texts[0]
        if texts[1:]:
            named.values[aliases] = [*texts[1:], *shapes.texts(named.values.get(aliases))]
    prompt = named.values.get("prompt")
    if isinstance(prompt, str) and "subject" in named.values and str(named.values["subject"]) not in prompt:
        named.values["prompt"] = prompt.replace("{subject}", "{}")  # a template that names the field


def _refuse_number_of_choice(named: NamedFields) -> None:
    """Refuse a target that is the number or the letter of one of several choices."""
    target = str(named.values.get("target", "")).strip()
    name = next((name for name in _CHOICES if name in named.unread), None)
    if name is None or not (target.isdecimal() or (len(target) == 1 and target.isalpha())):
        return
    choices = named.object[named.unread[name]]
    if isinstance(choices, list | Mapping) and target not in shapes.texts(choices):
        raise DataFormatError(
            f"{named.where}: '{named.origins.get('target')}' is {target!r}, which is none of '{named.unread[name]}'; "
            "write the text of the choice as the target"
        )


def _note_text(value: object) -> str:
    text = as_text(value)
    return json.dumps(value, ensure_ascii=False, default=str) if text is None else text


def _is_own(object: Mapping[str, Any]) -> bool:
    try:
        values = name_fields(object).values
    except DataFormatError:  # its own error is given where the record is read
        return any(_holds_prompt(fold_name(name), value) for name, value in object.items())
    return {"prompt", "target"} <= values.keys() and not isinstance(values["prompt"], list | Mapping)


def _holds_prompt(name: str, value: object) -> bool:
    return name in _CHATS or (name in TABLE["prompt"].names and as_text(value) is not None)


def _read(fields: Fields) -> EditRecord:
    record = name_fields(fields.values, fields.where).as_record()
    for name in ("prompt", "target"):
        if name not in record:
            there = ", ".join(map(str, fields.values)) or "none"
            raise DataFormatError(
                f"{fields.where}: no field is the {name} (fields here: {there}); say which one is: --map {name}=FIELD"
            )
    return read_record(Fields(record, fields.where))


def _origins(object: Mapping[str, Any]) -> Mapping[str, str]:
    return name_fields(object).origins


OWN = Layout(
    "kecore",
    (),
    "prompt and target, with subject for methods that edit at it, ...",
    _read,
    ("all of them",),
    (Published("your own", "kecore's layout, as JSONL, JSON or CSV", "any", "yours", "`record_to_json` writes it"),),
    detect=_is_own,
    origins=_origins,
    strict=True,
)
"""kecore's own layout: one object a record (:mod:`kecore.evaluate.own_layout`)."""
