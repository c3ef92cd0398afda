"""Whatever an endpoint answers, `chat` ends in a sentence, and no text of others moves a cursor or shows a password."""

import gzip
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import prompt_toolkit
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console

from conftest import SCRIPTS
from forked import COMMANDS
from lacuna.chat import endpoint, terminal
from lacuna.chat.answer import Answer, ask
from lacuna.chat.endpoint import connect
from lacuna.chat.session import Session, Turn
from lacuna.chat.settings import Settings
from lacuna.chat.terminal import Screen, converse
from lacuna.data.hub import stay_offline
from lacuna.errors import ConfigError, LacunaError, ModelError
from lacuna.reports.text import _print
from lacuna.runs.status import RunStatus, as_text
from lacuna.visible import OBEYED, shown_url, visible, visible_json, without_passwords

STOP = {"index": 0, "delta": {"content": "fine"}, "finish_reason": "stop"}
WILD = "a\x1b[2J\x9b31m\u202eb\x7f\r\n\tend"
TAME = "a\\x1b[2J\\x9b31m\\u202eb\\x7f\\r\n\tend"


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(**values: Any) -> bytes:
    return event({"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", **values})


def choice(**values: Any) -> bytes:
    return chunk(choices=[{**STOP, **values}])


GOOD = chunk(choices=[STOP])
STREAMS = {
    "empty": b"", "html": b"<html>502</html>", "html in a stream": event(b"<html>502</html>"), "half json": event(b"{"),
    "null": event(None), "a list": event([]), "a number": event(3), "a text": event("x"), "no object": event({}),
    "not utf-8": event(b'{"choices": "\xff\xfe"}'), "done at once": event(b"[DONE]"),
    "choices null": chunk(choices=None), "choices missing": chunk(), "choices a number": chunk(choices=3),
    "choices a text": chunk(choices="x"), "choices of null": chunk(choices=[None]),
    "choices of texts": chunk(choices=["x"]),
    "delta null": choice(delta=None), "delta missing": chunk(choices=[{"index": 0, "finish_reason": "stop"}]),
    "delta a text": choice(delta="x"), "delta a list": choice(delta=[]),
    "content a number": choice(delta={"content": 3}),
    "content a list": choice(delta={"content": ["x"]}), "content an object": choice(delta={"content": {"text": "x"}}),
    "content true": choice(delta={"content": True}), "end a number": choice(finish_reason=3),
    "end a list": choice(finish_reason=["stop"]), "usage a text": GOOD + chunk(choices=[], usage="many"),
    "usage a list": GOOD + chunk(choices=[], usage=[1]), "usage a number": GOOD + chunk(choices=[], usage=3),
    "usage of texts": GOOD + chunk(choices=[], usage={"prompt_tokens": "x", "completion_tokens": 1, "total_tokens": 1}),
    "an error": event({"error": {"message": "no room"}}), "an error as text": event({"error": "no room"}),
    "an error as list": event({"error": [1]}), "good, then html": GOOD + event(b"<html>"),
}  # fmt: skip
"""Malformed answers of status 200."""
JSON = b'{"error": {"message": "no room"}}'
REFUSALS = {
    "html": (b"<html>502</html>", {}), "nothing": (b"", {}), "null": (b"null", {}), "a list": (b"[1]", {}),
    "error a list": (b'{"error": [1]}', {}), "message a number": (b'{"error": {"message": 3}}', {}),
    "not utf-8": (b'{"error": "\xff"}', {}), "breaks off": (JSON, {"Content-Length": "1000"}),
    "broken gzip": (JSON, {"Content-Encoding": "gzip"}),
    "half a gzip": (gzip.compress(JSON)[:-9], {"Content-Encoding": "gzip"}),
    "odd charset": (JSON, {"Content-Type": "application/json; charset=hex"}),
}  # fmt: skip
"""Bodies and headers of a refusal."""
CASES: dict[str, tuple[int, bytes, dict[str, str]]] = {
    **{f"200 {name}": (200, body, {}) for name, body in STREAMS.items()},
    "200 packed": (200, gzip.compress(GOOD), {"Content-Encoding": "gzip"}),
    "200 broken gzip": (200, GOOD, {"Content-Encoding": "gzip"}),
    "200 breaks off": (200, GOOD, {"Content-Length": "1000"}),
    **{f"{code} {name}": (code, *case) for code in (400, 404, 503) for name, case in REFUSALS.items()},
}


class Malformed(BaseHTTPRequestHandler):
    """The model is the name of a case; the prompt "good" is answered well, and so is any other model."""

    asked: list[Any] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, b'{"data": [3, null]}', {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        is_good = request["messages"][-1]["content"] == "good"
        self.send(
            *((200, GOOD, {}) if is_good else CASES.get(request["model"], (200, self.made(request["model"]), {})))
        )

    def made(self, model: str) -> bytes:
        if model == "wild":
            return choice(delta={"content": WILD + "\ud800"})
        return chunk(choices=[{**STOP, "delta": {"content": "x" * 1000}, "finish_reason": None}]) * 20

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "text/event-stream"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Malformed)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A conversation of these lines; what stood on the screen."""

    def call(model: Any, session: Session, *lines: str) -> str:
        left = iter(lines)

        class Prompts:
            def __init__(self, history: FileHistory | InMemoryHistory) -> None:
                pass

            def prompt(self, _: str) -> str:
                if (line := next(left, None)) is None:
                    raise EOFError
                return line

        screen = io.StringIO()
        monkeypatch.setattr(prompt_toolkit, "PromptSession", Prompts)
        monkeypatch.setattr(terminal, "history_file", lambda: None)
        monkeypatch.setattr(terminal, "Console", lambda **words: Console(file=screen, width=4000, **words))
        converse(model, session)
        return screen.getvalue()

    return call


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "chat"), *words])
    try:
        COMMANDS["chat"]()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_answer_is_one_sentence_and_the_conversation_goes_on(
    name: str, url: str, spoken: Callable[..., str]
) -> None:
    session = Session(Settings(), None, (Turn("before", "kept", 0),))
    screen = spoken(connect(url, name, None), session, "bad", "/retry", "good")
    errors = [line for line in screen.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, screen
    assert all(line.startswith(f"error: {url}: ") for line in errors)
    assert "Traceback" not in screen
    said = [message["content"] for message in Malformed.asked[-1]["messages"]]
    assert said == ["before", "kept", "good"]
    assert screen.rstrip().endswith("fine")


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("name", CASES)
def test_a_malformed_answer_to_a_pipe_ends_in_a_sentence(
    name: str, more: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, "good\nbad\n", "--base-url", url, "--model", name, *more) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"error: line 2: {url}: ")
    assert len(err.splitlines()) == 1
    assert "fine" in out


def test_a_refusal_that_cannot_be_read_still_tells_its_status(url: str) -> None:
    for name in ("503 breaks off", "503 broken gzip", "503 half a gzip", "503 html"):
        with pytest.raises(ModelError, match=r"the endpoint refused \(status 503\)"):
            ask(connect(url, name, None), [{"role": "user", "content": "bad"}], Settings(), 0, lambda _: None)


def test_an_answer_is_bounded_in_length_and_in_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(most: int) -> Answer:
        words = [{"role": "user", "content": "bad"}]
        return ask(connect(url, "long", None), words, Settings(max_tokens=most), 0, lambda _: None)

    with pytest.raises(ModelError, match="says more than max_tokens allows"):
        asked(100)
    with pytest.raises(ModelError, match="broke off in the middle"):
        asked(200)
    monkeypatch.setattr(endpoint, "LONGEST_STREAM", 1000)
    with pytest.raises(ModelError, match="does not come to an end"):
        asked(200)
    monkeypatch.undo()
    monkeypatch.setattr(endpoint, "LONGEST_TIME", -1.0)
    with pytest.raises(ModelError, match="does not come to an end"):
        asked(200)


def test_control_characters_of_an_endpoint_are_shown(
    url: str, spoken: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    screen = spoken(connect(url, "wild", None), Session(Settings()), "bad")
    assert "a\\x1b[2J\\x9b31m\\u202eb\\x7f\\r" in screen
    assert not OBEYED.search(screen)
    assert piped(monkeypatch, "bad\n", "--base-url", url, "--model", "wild") == 0
    assert capfd.readouterr().out == TAME + "\ufffd\n"
    assert piped(monkeypatch, "bad\n", "--base-url", url, "--model", "wild", "--json") == 0
    out = capfd.readouterr().out
    assert json.loads(out)["text"] == WILD + "\ufffd"
    assert not OBEYED.search(out)
    monkeypatch.setitem(CASES, "wild refusal", (503, WILD.encode(), {}))
    assert piped(monkeypatch, "bad\n", "--base-url", url, "--model", "wild refusal") == 2
    err = capfd.readouterr().err
    assert "a\\x1b[2J\\x9b31m\\u202eb\\x7f" in err
    assert not OBEYED.search(err)


def test_what_markdown_makes_of_entities_is_shown_too() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Screen(console) as screen:
        screen.say("a&#x202e;b &rlm; `x`\n\n# c&#13;d\n")
    assert "a\\u202eb \\u200f x" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not OBEYED.search(console.file.getvalue())  # type: ignore[attr-defined]


def test_reasons_in_a_status_and_in_a_report_are_shown() -> None:
    said = as_text([RunStatus("run", None, "failed", reason=WILD)])
    console = Console(file=io.StringIO(), width=200)
    _print(console, WILD, ("run", "why"), [("run", WILD)])
    for text in (said, console.file.getvalue()):  # type: ignore[attr-defined]
        assert "a\\x1b[2J\\x9b31m\\u202eb\\x7f" in text
        assert not OBEYED.search(text)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_visible_text_is_obeyed_by_no_terminal_and_json_stays_what_it_says(text: str) -> None:
    line = visible_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(line) == text
    assert not OBEYED.search(visible(text) + line)
    assert visible(text) == text or OBEYED.search(text)


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("👨‍👩‍👧 🏳️‍🌈", "naïve café", "می‌خواهم", "日本\u3000語", "12\u00a0000", "a\n\tb"):
        assert visible(text) == text


def test_no_message_has_the_password_of_a_url(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for url in (
        "http://me:geheim@host/v1", "ftp://me:geheim@host", "me:geheim@host/v1", "http://me:geheim@", "http://geheim@[::1",
        "http://me:geheim@host:port/v1", "http://me:ge@heim@host/v1", "https://me:ge/heim@host/v1",
    ):  # fmt: skip
        with pytest.raises(ConfigError) as found:
            connect(url, "m", None)
        assert not re.search("heim|ge[@/]", str(found.value))
    assert shown_url("https://huggingface.co") == "https://huggingface.co"
    assert without_passwords("see http://a:b@c/d and me@x") == "see http://…@c/d and me@x"
    assert LacunaError(["one http://a:b@c", "two"]).problems == ["one http://…@c", "two"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("lacuna.data.hub.unreachable", lambda: "no http://me:geheim@hub.local\x1b")
    for place in ("http://me:geheim@hub.local", "me:geheim@hub.local"):
        monkeypatch.setenv("HF_ENDPOINT", place)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        stay_offline(["org/data"])
        err = capfd.readouterr().err
        assert "…@hub.local cannot be reached (no http://…@hub.local\\x1b)" in err
        assert "geheim" not in err


@contextmanager
def no_slower_than(seconds: float) -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


@pytest.mark.parametrize("line", ["value = compute(1)\n", "- item\n", "```\n", "words\n", "words "])
def test_a_long_block_is_shown_in_linear_time(line: str) -> None:
    """Looked at anew for each piece, 2,400 lines took minutes."""
    text = "~~~~python\n" * (line[0] in "v`") + line * 2400
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    with no_slower_than(20), Screen(console) as screen:
        for start in range(0, len(text), 4):
            screen.say(text[start : start + 4])
