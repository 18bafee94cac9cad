"""``/v1/completions`` and ``/v1/chat/completions``, as OpenAI's clients know them."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from kecore_serve.server.answers import Answers, ChatAnswers, CompletionAnswers
from kecore_serve.server.errors import ApiError, describe_error
from kecore_serve.server.exchange import Exchange
from kecore_serve.server.prompts import chat_prompt, completion_prompts
from kecore_serve.server.sampling import Sampling
from kecore_serve.server.schemas import MOST_TEXTS, ChatRequest, CompletionRequest, WritingRequest
from kecore_serve.server.service import STATE_HEADER, Service, service_of
from kecore_serve.server.worker import Prompt, Wrote

__all__ = ["router"]

_LOG = logging.getLogger(__name__)
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
router = APIRouter(prefix="/v1", tags=["texts"])
_Service = Annotated[Service, Depends(service_of)]
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


@router.post("/completions", responses={200: {"content": _STREAM}})
async def complete(body: CompletionRequest, request: Request, service: _Service) -> Response:
    """Write texts behind prompts."""
    service.check_name(body.model)
    prompts = completion_prompts(body, service.plain_encoder)
    max_tokens = _check_tokens(body.max_tokens or _DEFAULT_TOKENS, "max_tokens", service)
    sampling = _sampling(body, max_tokens, body.logprobs)
    answers = CompletionAnswers(_head("cmpl", service), len(prompts) * (body.n or 1))
    return await _answer(_Job(body, prompts, sampling, answers, is_cut=False), request, service)


@router.post("/chat/completions", responses={200: {"content": _STREAM}})
async def complete_chat(body: ChatRequest, request: Request, service: _Service) -> Response:
    """Write the next message of a chat."""
    service.check_name(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", param="top_logprobs")
    prompt = chat_prompt(body.messages, service.tokenizer)
    given = body.max_completion_tokens or body.max_tokens
    max_tokens = _check_tokens(given or service.settings.max_tokens, "max_completion_tokens", service)
    sampling = _sampling(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    answers = ChatAnswers(_head("chatcmpl", service), body.n or 1)
    return await _answer(_Job(body, [prompt], sampling, answers, is_cut=given is None), request, service)


@dataclass(frozen=True, slots=True)
class _Job:
    """A request that was checked.

    Args:
        body: the request.
        prompts: its prompts.
        sampling: how texts are written.
        answers: makes bodies of them.
        is_cut: texts may end where the context does.
    """

    body: WritingRequest
    prompts: Sequence[Prompt]
    sampling: Sampling
    answers: Answers
    is_cut: bool


def _head(kind: str, service: Service) -> dict[str, Any]:
    """Return the fields that every body of an answer begins with."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.settings.name}


def _check_tokens(max_tokens: int, param: str, service: Service) -> int:
    if max_tokens > service.settings.max_tokens:
        message = f"{param} must be at most {service.settings.max_tokens} on this server, got {max_tokens}"
        raise ApiError(400, message, "invalid_value", param=param)
    return max_tokens


def _sampling(body: WritingRequest, max_tokens: int, alternatives: int | None) -> Sampling:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=stop,
        alternatives=alternatives,
    )


async def _answer(job: _Job, request: Request, service: Service) -> Response:
    """Let the worker write the texts of a request, and send them at once or as they come."""
    copies = job.body.n or 1
    if len(job.prompts) * copies > MOST_TEXTS:
        message = f"a request may ask for {MOST_TEXTS} texts, got {len(job.prompts)} prompts times n = {copies}"
        raise ApiError(400, message, "invalid_value", param="n")
    if job.body.stream_options is not None and not job.body.stream:
        raise ApiError(400, "stream_options needs stream: true", "invalid_value", param="stream_options")
    exchange = Exchange(
        service.worker, job.prompts, copies, job.sampling,
        is_streamed=bool(job.body.stream), is_cut=job.is_cut, is_gone=request.is_disconnected,
    )  # fmt: skip
    started = await exchange.start()
    job.answers.begin(started)
    service.metrics.prompt_tokens.inc(sum(started.prompt_tokens))
    headers = {STATE_HEADER: started.state}
    if job.body.stream:
        events = _events(job, exchange, service)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-store"}
        )
    async for wrote in exchange.pieces():
        _count(wrote, service)
        job.answers.add(wrote)
    return JSONResponse(job.answers.whole(), headers=headers)


def _count(wrote: Wrote, service: Service) -> None:
    if wrote.piece.finish_reason is not None:
        service.metrics.written_tokens.inc(wrote.written)


async def _events(job: _Job, exchange: Exchange, service: Service) -> AsyncIterator[str]:
    """Yield server-sent events, the last of which says that it is the last."""
    options = job.body.stream_options
    include_usage = options is not None and options.include_usage
    try:
        for chunk in job.answers.opening(include_usage):
            yield _event(chunk)
        async for wrote in exchange.pieces():
            _count(wrote, service)
            for chunk in job.answers.chunks(wrote, include_usage):
                yield _event(chunk)
        if include_usage:
            yield _event(job.answers.usage_chunk())
    except Exception as error:  # noqa: BLE001 - the answer has begun: the error is told in its stream
        described = describe_error(error)
        if described.status >= 500:
            _LOG.error("a stream ended in an error", exc_info=error)
        yield _event(described.body())
        return
    finally:
        exchange.cancel()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
