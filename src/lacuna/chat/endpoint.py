"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, transformers serve, a service."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from lacuna.chat.answer import Answer, Say, without_oldest
from lacuna.chat.settings import Settings
from lacuna.data.formats import Message
from lacuna.errors import ConfigError, ModelError
from lacuna.visible import shown_url
from lacuna.words import did_you_mean

NO_KEY = "none"
"""What a server gets that asks for no key: the client wants to send one."""
LONGEST = 300
"""Characters of an endpoint's own words."""
LONGEST_REFUSAL = 2**16
"""Bytes of them that are read."""
LONGEST_STREAM = 2**26
"""Bytes of an answer, with what is around its text."""
LONGEST_TOKEN = 100
"""Characters for each of max_tokens: an endpoint that says more does not keep to it."""
SHORTEST_BOUND = 10_000
"""Characters that an answer may always have."""
LONGEST_TIME = 1800.0
"""Seconds of an answer; between two signs of life, it is the client's 600."""


@dataclass(frozen=True)
class Endpoint:
    name: str
    base_url: str
    client: openai.OpenAI
    key: str = NO_KEY
    is_chat: bool = True

    def answer(self, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Answer:
        """As the endpoint streams it; where it says that the context is full, without the oldest turns.

        Raises ModelError in a sentence where the endpoint is down, refuses, or does not speak the protocol.
        """
        kept = list(messages)
        while True:
            try:
                return self._answer(kept, settings, seed, say, len(messages) - len(kept))
            except openai.BadRequestError as error:
                shorter = without_oldest(kept)
                if shorter is None or "context" not in str(error).lower():
                    raise self._refused(error) from None
                kept = shorter

    def _answer(self, messages: list[Message], settings: Settings, seed: int, say: Say, left_out: int) -> Answer:
        pieces: list[str] = []
        end: str | None = None
        usage: Usage = (None, None)
        room = max(SHORTEST_BOUND, LONGEST_TOKEN * settings.max_tokens)
        for part in self._parts(messages, settings, seed):
            end, usage = part.end or end, part.usage or usage
            room -= len(part.text)
            if room < 0:
                raise ModelError(f"{self.base_url}: the endpoint says more than max_tokens allows: it was stopped")
            if part.text:
                pieces.append(part.text)
                say(part.text)
        if end is None:
            raise ModelError(f"{self.base_url}: the endpoint broke off in the middle of the answer")
        return Answer("".join(pieces), "max_tokens" if end == "length" else "stop", *usage, left_out)

    def _parts(self, messages: list[Message], settings: Settings, seed: int) -> "Iterator[Part]":
        """Whatever the endpoint sends, it ends in a ModelError, or in the BadRequestError of a context that is full."""
        drawn = settings.model_dump() | {"seed": seed}
        request: Any = {"model": self.name, "messages": messages, "stream_options": {"include_usage": True}, **drawn}
        try:
            with self.client.chat.completions.create(stream=True, **request) as chunks:
                yield from map(part_of, chunks)
        except (openai.BadRequestError, ModelError):
            raise
        except openai.APIError as error:
            raise self._refused(error) from None
        except httpx2.HTTPError as error:
            raise ModelError(f"{self.base_url}: the endpoint broke off ({self._said(str(error))})") from None
        except Exception as error:
            said = self._said(f"{type(error).__name__}: {error}")
            raise ModelError(f"{self.base_url}: what the endpoint sends is no answer ({said})") from error

    def _refused(self, error: openai.APIError) -> ModelError:
        """In a sentence. A service's words may hold the key, which must not be shown."""
        said = self._said(
            error.response.text if isinstance(error, openai.APIStatusError) else str(error.__cause__ or error)
        )
        match error:
            case openai.APITimeoutError():
                why = "the endpoint does not answer in time"
            case openai.APIConnectionError():
                why = "no endpoint answers there, or it broke off; is it running?"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                why = "the key is missing or refused; --api-key-env names the variable that holds it"
            case openai.NotFoundError():
                why = f"the endpoint has no model {self.name!r}, or nothing under this URL{self._known()}"
            case openai.APIStatusError():
                why = f"the endpoint refused (status {error.status_code})"
            case _:
                why = "the endpoint broke off"
        return ModelError(f"{self.base_url}: {why} ({said})")

    def _said(self, text: str) -> str:
        return " ".join(text.replace(self.key, "…" if self.key != NO_KEY else NO_KEY).split())[:LONGEST]

    def _known(self) -> str:
        try:
            names = [str(model.id) for model in self.client.models.list()]
        except Exception:
            return ""
        return f"{did_you_mean(self.name, names)}; it has {self._said(', '.join(names[:10])) or 'none'}"


Usage = tuple[int | None, int | None]
"""Tokens of the prompt and of the answer."""


@dataclass(frozen=True)
class Part:
    text: str
    end: str | None
    usage: Usage | None


def part_of(chunk: Any) -> Part:
    """What a chunk of a stream says. The client has checked no type of it: raises whatever a malformed one leads to."""
    text, end = "", None
    for choice in chunk.choices:
        said, end = choice.delta.content, choice.finish_reason or end
        if not isinstance(said, str | None) or not isinstance(end, str | None):
            raise TypeError("its text or its finish_reason is no text")
        text += said or ""
    usage = None if chunk.usage is None else (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
    if not all(isinstance(count, int | None) for count in usage or ()):
        raise TypeError("its usage is no number")
    return Part(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), end, usage)


class Bounded(httpx2.SyncByteStream):
    """What an endpoint sends, up to a size and a time. Of a refusal, whatever can be read of it."""

    def __init__(self, response: httpx2.Response, base_url: str) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self.stream = response.stream
        self.is_refusal = response.is_error
        self.is_packed = response.headers.get("content-encoding", "identity").lower() != "identity"
        self.base_url = base_url

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._refusal() if self.is_refusal else self._answer()
        except httpx2.HTTPError:
            if not self.is_refusal:
                raise

    def _refusal(self) -> Iterator[bytes]:
        room = 0 if self.is_packed else LONGEST_REFUSAL
        end = time.monotonic() + LONGEST_TIME
        for chunk in self.stream if room else ():
            yield chunk[:room]
            room -= len(chunk)
            if room <= 0 or time.monotonic() > end:
                return

    def _answer(self) -> Iterator[bytes]:
        if self.is_packed:
            raise ModelError(f"{self.base_url}: the endpoint packs its answer, though it was asked not to")
        room = LONGEST_STREAM
        end = time.monotonic() + LONGEST_TIME
        for chunk in self.stream:
            room -= len(chunk)
            if room < 0 or time.monotonic() > end:
                bound = f"{LONGEST_STREAM >> 20} MiB" if room < 0 else f"{LONGEST_TIME / 60:.0f} minutes"
                raise ModelError(f"{self.base_url}: the endpoint does not come to an end: stopped after {bound}")
            yield chunk

    def close(self) -> None:
        self.stream.close()


def client_of(base_url: str, key: str) -> openai.OpenAI:
    """Nothing is sent packed: a small answer must not unpack to a large one."""

    def bound(response: httpx2.Response) -> None:
        response.stream = Bounded(response, base_url)
        if response.is_error:
            response.headers.pop("content-encoding", None)

    http = openai.DefaultHttpxClient(event_hooks={"response": [bound]})
    headers = {"Accept-Encoding": "identity"}
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, default_headers=headers, http_client=http)


def connect(base_url: str, model: str, key_variable: str | None) -> Endpoint:
    """key_variable: the environment variable that holds the key. Nothing is sent yet. Raises ConfigError."""
    no_url = ConfigError(f"--base-url {shown_url(base_url)}: this is no URL such as http://localhost:8000/v1")
    try:
        url = urlsplit(base_url)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        raise no_url from None
    if not is_url or not base_url.isprintable():
        raise no_url
    if "@" in url.netloc:
        raise ConfigError("--base-url: leave the name and the password out of it; --api-key-env names a key's variable")
    key = NO_KEY
    if key_variable is not None:
        key = os.environ.get(key_variable, "")
        if not key:
            raise ConfigError(f"--api-key-env {key_variable}: there is no such environment variable, or it is empty")
    return Endpoint(model, base_url, client_of(base_url, key), key)
