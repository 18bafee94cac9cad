"""What requests and answers look like; FastAPI checks them and writes the OpenAPI description of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

__all__ = [
    "ChatRequest",
    "CheckoutRequest",
    "CompletionRequest",
    "EditList",
    "EditObject",
    "EditRequestBody",
    "ErrorBody",
    "FactBody",
    "ModelList",
    "ModelObject",
    "Reverted",
    "StateObject",
    "TagRequest",
    "WritingRequest",
]

MOST_TEXTS = 128
"""Texts of one request: prompts times ``n``."""

_LARGEST = 2**63 - 1


def _check_characters(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can write and no tokenizer reads."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds half of a surrogate pair, which is no character")
    return text


_Characters = AfterValidator(_check_characters)
Text: TypeAlias = Annotated[str, StringConstraints(strict=True), _Characters]
ShortText: TypeAlias = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200), _Characters]
Token: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
Name: TypeAlias = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class _Body(BaseModel):
    """A body with the fields that it names and no others, of the types that it names and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    """How a stream is written."""

    include_usage: bool = False


class WritingRequest(_Body):
    """What both ways of asking for texts have in common."""

    model: ShortText
    max_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    stop: ShortText | Annotated[list[ShortText], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    # Fields of OpenAI's that clients send with the value that changes nothing.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None


class CompletionRequest(WritingRequest):
    """Texts behind prompts."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    def text(self) -> str:
        """Return what it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(_Body):
    """The form of an answer: text."""

    type: Literal["text"]


class ChatRequest(WritingRequest):
    """The next message of a chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class FactBody(_Body):
    """A fact that is edited into the model."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=10_000), _Characters]
    subject: Annotated[str, StringConstraints(min_length=1, max_length=1_000), _Characters] | None = None
    target: Annotated[str, StringConstraints(min_length=1, max_length=1_000), _Characters]
    ground_truth: Annotated[str, StringConstraints(max_length=1_000), _Characters] | None = None
    id: ShortText | None = None


class EditRequestBody(_Body):
    """An edit that is made now."""

    facts: Annotated[list[FactBody], Field(min_length=1, max_length=10_000)]
    method: ShortText | None = None
    preset: ShortText | None = None
    config: dict[str, Any] = {}
    note: Annotated[str, StringConstraints(max_length=2_000), _Characters] = ""


class TagRequest(_Body):
    """A name for the state of now."""

    name: Name


class CheckoutRequest(_Body):
    """The tag or state that the model is to be in."""

    to: Name


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class ModelObject(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kecore"


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class EditObject(BaseModel):
    """An edit of the ledger."""

    id: str
    object: Literal["edit"] = "edit"
    method: str
    config: dict[str, Any]
    seed: int
    facts: list[dict[str, Any]]
    created: float
    author: str
    note: str
    active: bool
    state: str


class EditList(BaseModel):
    """The edits of the ledger, oldest first."""

    object: Literal["list"] = "list"
    data: list[EditObject]
    state: str


class Reverted(BaseModel):
    """An edit that was taken back.

    Args:
        later: edits that were planned while it was on the model, and stay as they were planned.
    """

    id: str
    object: Literal["edit.reverted"] = "edit.reverted"
    state: str
    later: list[str]


class StateObject(BaseModel):
    """The state of the model's edits."""

    object: Literal["state"] = "state"
    state: str
    active: list[str]
    tags: dict[str, str]
