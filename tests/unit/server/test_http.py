"""The server as a client sees it: the openai library, and plain HTTP where something is wrong."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import NAME, Served, make_editor, serving
from slow_reference import greedy

from kecore.api.errors import ConfigError
from kecore_serve.server.limits import Rates
from kecore_serve.server.opening import Capacity
from kecore_serve.server.running import bind
from kecore_serve.server.settings import Settings, make_token

PROMPTS = ["The capital of France is", "The Danube", "Where does the Danube flow? It flows to the"]
USER = [{"role": "user", "content": "Where is Rome?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(max_tokens=64, body_bytes=20_000) as server:
        yield server


def _expected(served: Served, prompt: str, tokens: int) -> str:
    """The text of one prompt at a time, without a cache."""
    view, tokenizer = served.service.model.view, served.service.tokenizer
    ids = tokenizer(prompt)["input_ids"]
    written = greedy(view.model, tokenizer, prompt, tokens)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([*ids, *written], **options)[len(tokenizer.decode(ids, **options)) :]


def test_several_prompts_give_what_each_gives_alone(served: Served) -> None:
    answer = served.openai.completions.create(model=NAME, prompt=PROMPTS, max_tokens=9, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [_expected(served, prompt, 9) for prompt in PROMPTS]
    tokens = sum(len(served.service.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tokens
    assert answer.usage.completion_tokens == 27
    assert answer.system_fingerprint == served.ledger.state
    ids = served.service.tokenizer(PROMPTS[0])["input_ids"]
    by_ids = served.openai.completions.create(model=NAME, prompt=ids, max_tokens=9, temperature=0)
    assert by_ids.choices[0].text == answer.choices[0].text


def test_a_stream_has_the_same_text_and_probabilities(served: Served) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": PROMPTS[:2], "max_tokens": 7, "temperature": 0, "logprobs": 3}
    whole = served.openai.completions.create(**options)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in served.openai.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        assert chunk.system_fingerprint == served.ledger.state
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert usage == whole.usage
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == streamed
        for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
            assert logprob == max(top.values())
            assert sum(map(math.exp, top.values())) <= 1


def test_a_chat_is_put_into_the_template(served: Served) -> None:
    answer = served.openai.chat.completions.create(
        model=NAME, messages=USER, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    text = served.service.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    ids = served.service.tokenizer(text, add_special_tokens=False)["input_ids"]
    plain = served.openai.completions.create(model=NAME, prompt=ids, max_tokens=6, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == plain.choices[0].text
    assert choice.logprobs is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content or ()] == [2] * 6
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in served.openai.chat.completions.create(
            model=NAME, messages=USER, max_tokens=6, temperature=0, stream=True
        )
    ]
    assert "".join(pieces) == choice.message.content


def test_draws_repeat_by_seed_and_copies_differ(served: Served) -> None:
    def draw(seed: int, n: int) -> list[str]:
        answer = served.openai.completions.create(model=NAME, prompt="The", max_tokens=8, seed=seed, n=n, top_p=0.9)
        return [choice.text for choice in answer.choices]

    first = draw(1, 3)
    assert first == draw(1, 3)
    assert len(set(first)) == 3
    assert draw(2, 1) != first[:1]


def test_a_stop_ends_a_text(served: Served) -> None:
    text = _expected(served, PROMPTS[0], 9)
    stop = text[4:6]
    answer = served.openai.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=9, temperature=0, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_the_models_are_listed(served: Served) -> None:
    assert [model.id for model in served.openai.models.list()] == [NAME]
    assert served.openai.models.retrieve(NAME).owned_by == "kecore"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; this server has 'tiny'"):
        served.openai.models.retrieve("other")


def _chat(**fields: Any) -> tuple[str, Any]:
    return "/v1/chat/completions", {"model": NAME, "messages": USER, **fields}


def _text(**fields: Any) -> tuple[str, Any]:
    return "/v1/completions", {"model": NAME, "prompt": "The", **fields}


@pytest.mark.parametrize(
    ("request_", "status", "code", "message"),
    [
        (_text(model="gpt-4"), 404, "model_not_found", "this server has 'tiny'"),
        (_text(max_tokens=0), 400, "invalid_value", "max_tokens: Input should be greater than or equal to 1"),
        (_text(max_tokens=65), 400, "invalid_value", "at most 64 on this server, got 65"),
        (_text(temperature="warm"), 400, "invalid_value", "temperature: Input should be a valid number"),
        (_text(tools=[]), 400, "invalid_value", "tools: Extra inputs are not permitted"),
        (_text(echo=True), 400, "invalid_value", "echo"),
        (_text(stop=[""]), 400, "invalid_value", "at least 1 character"),
        (_text(prompt=[10**6]), 400, "RequestError", "token 1000000 is none of the model's"),
        (_text(prompt=["The"] * 65, n=2), 400, "invalid_value", "128 texts, got 65 prompts times n = 2"),
        (_text(prompt="Rome " * 600), 400, "context_length_exceeded", "the model's context holds 256 tokens"),
        (_text(prompt="Rome \ud800"), 400, "invalid_value", "prompt"),
        (_text(stream_options={"include_usage": True}), 400, "invalid_value", "needs stream: true"),
        (_chat(messages=[]), 400, "invalid_value", "messages: List should have at least 1 item"),
        (_chat(top_logprobs=2), 400, "invalid_value", "top_logprobs needs logprobs: true"),
        (_chat(messages=[{"role": "robot", "content": "x"}]), 400, "invalid_value", "messages.0.role"),
        (("/v1/completions", "{"), 400, "invalid_value", "JSON"),
        (("/v1/completions", "[" * 15_000), 400, None, ""),
        (("/v1/completions", '{"seed": ' + "9" * 5000 + "}"), 400, None, ""),
        (("/v1/completions", "x" * 30_000), 413, "body_too_large", "larger than 20,000 bytes"),
        (("/v1/nothing", {}), 404, "not_found", ""),
        (("/v1/models", {}), 405, "method_not_allowed", ""),
    ],
)
def test_errors_have_openais_shape(
    served: Served, request_: tuple[str, Any], status: int, code: str | None, message: str
) -> None:
    path, body = request_
    content = body if isinstance(body, str) else json.dumps(body)
    answer = served.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    assert message in error["message"]


def test_chunks_of_a_body_are_counted_without_a_length(served: Served) -> None:
    answer = served.http.post("/v1/completions", content=(b"x" * 5000 for _ in range(6)))
    assert answer.status_code == 413


def test_a_web_page_cannot_call_by_a_name_of_its_own() -> None:
    with serving(hosts=("localhost", "127.0.0.1")) as served:
        assert served.http.get("/health").json() == {"status": "ok"}
        refused = served.http.get("/health", headers={"Host": "evil.example:8000"})
        assert refused.status_code == 421
        assert refused.json()["error"]["code"] == "unknown_host"


def test_health_readiness_and_figures(served: Served) -> None:
    assert served.http.get("/health").json() == {"status": "ok"}
    assert served.http.get("/ready").json() == {"status": "ready", "state": served.ledger.state}
    served.openai.completions.create(model=NAME, prompt="The", max_tokens=3, temperature=0)
    served.http.get("/secret/path")
    figures = served.http.get("/metrics").text
    assert 'kecore_requests_total{endpoint="/v1/completions",status="200"}' in figures
    assert 'kecore_requests_total{endpoint="unknown",status="404"}' in figures
    assert "secret" not in figures
    assert "kecore_waiting_requests 0.0" in figures
    assert "kecore_active_edits 0.0" in figures


def test_a_full_queue_and_a_stopping_server_say_when_to_come_again() -> None:
    with serving(capacity=Capacity(queue=1)) as served:
        go, begun = threading.Event(), threading.Event()
        worker = served.service.worker

        def hold() -> None:
            begun.set()
            go.wait(30)

        held = worker.operate(hold)
        begun.wait(30)
        refused = served.http.post(*_text()[:1], json=_text()[1])
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        go.set()
        held.result(30)
        assert worker.stop(30)
        assert served.http.post("/v1/completions", json=_text()[1]).json()["error"]["code"] == "stopping"
        assert served.http.get("/ready").status_code == served.http.get("/health").status_code == 503


def test_a_failure_inside_tells_nothing_and_ends_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as served:

        def fail(*_: object) -> None:
            raise RuntimeError("a path of the server")

        with monkeypatch.context() as patch:
            patch.setattr("kecore_serve.server.batch.choose_tokens", fail)
            answer = served.http.post("/v1/completions", json=_text()[1])
            assert answer.status_code == 500
            assert "path" not in answer.text
            stream = served.http.post("/v1/completions", json=_text(stream=True)[1])
            assert json.loads(stream.text.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "a path of the server" in caplog.text
        assert served.http.post("/v1/completions", json=_text()[1]).status_code == 200


def test_a_client_that_goes_away_is_not_written_for() -> None:
    with serving() as served:
        for chunk in served.openai.completions.create(model=NAME, prompt="The", max_tokens=250, stream=True):
            assert chunk.choices
            break  # leaving the loop does not close the connection; closing the client does
        served.openai.close()
        answer = served.http.post("/v1/completions", json=_text()[1])
        assert answer.status_code == 200
        for _ in range(200):
            if served.service.worker.running == 0:
                break
            threading.Event().wait(0.02)
        assert served.service.worker.running == 0


def test_batches_that_cannot_be_joined_take_turns() -> None:
    with serving(make_editor("mistral")) as served:
        together = served.openai.completions.create(model=NAME, prompt=PROMPTS, max_tokens=6, temperature=0)
        assert [choice.text for choice in together.choices] == [_expected(served, prompt, 6) for prompt in PROMPTS]


def test_rates_fill_steadily() -> None:
    now = 0.0
    rates = Rates(60, clock=lambda: now)
    assert [rates.wait("a") for _ in range(60)] == [0.0] * 60
    assert rates.wait("a") == pytest.approx(1.0)
    assert rates.wait("b") == 0.0
    now = 1.0
    assert rates.wait("a") == 0.0
    assert rates.wait("a") > 0


def test_a_rate_is_told() -> None:
    with serving(rate=2) as served:
        answers = [served.http.get("/health") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[-1].headers["Retry-After"] in {"30", "31"}


def test_a_short_token_and_a_port_in_use_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 16 visible ASCII characters, got 5"):
        Settings(name=NAME, token="short")
    tokens = {make_token() for _ in range(3)}
    assert len(tokens) == 3
    assert Settings(name=NAME, token=tokens.pop()).rate == 0
    listener = bind("127.0.0.1", 0)
    listener.listen()
    with listener, pytest.raises(ConfigError, match="cannot be listened on"):
        bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(ConfigError, match="no address of this machine"):
        bind("no.such.host.invalid", 80)
