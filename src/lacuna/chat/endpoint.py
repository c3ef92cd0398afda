"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, transformers serve, a service."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from lacuna.chat.answer import Answer, End, Say, without_oldest
from lacuna.chat.settings import Settings
from lacuna.config.files import did_you_mean
from lacuna.data.formats import Message
from lacuna.errors import ConfigError, ModelError

NO_KEY = "none"
"""What a server gets that asks for no key: the client wants to send one."""


LONGEST = 300
"""Characters of an endpoint's own words."""


@dataclass(frozen=True)
class Endpoint:
    name: str
    base_url: str
    client: openai.OpenAI
    key: str = NO_KEY
    is_chat: bool = True

    def answer(self, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Answer:
        """As the endpoint streams it; where it says that the context is full, without the oldest turns.

        Raises ModelError in a sentence where the endpoint is down, or refuses.
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
            except openai.APIError as error:
                raise self._refused(error) from None

    def _answer(self, messages: list[Message], settings: Settings, seed: int, say: Say, left_out: int) -> Answer:
        drawn = settings.model_dump() | {"seed": seed}
        request: Any = {"model": self.name, "messages": messages, "stream_options": {"include_usage": True}, **drawn}
        text, end, usage = "", None, None
        with self.client.chat.completions.create(stream=True, **request) as chunks:
            for chunk in chunks:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    end = choice.finish_reason or end
                    if choice.delta.content:
                        text += choice.delta.content
                        say(choice.delta.content)
        if end is None:
            raise ModelError(f"{self.base_url}: the endpoint broke off in the middle of the answer")
        why: End = "max_tokens" if end == "length" else "stop"
        if usage is None:
            return Answer(text, why, None, None, left_out)
        return Answer(text, why, usage.prompt_tokens, usage.completion_tokens, left_out)

    def _refused(self, error: openai.APIError) -> ModelError:
        """In a sentence. A service's words may hold the key, which must not be shown."""
        said = error.response.text if isinstance(error, openai.APIStatusError) else str(error.__cause__ or error)
        said = " ".join(said.replace(self.key, "…" if self.key != NO_KEY else NO_KEY).split())[:LONGEST]
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

    def _known(self) -> str:
        try:
            names = [model.id for model in self.client.models.list()]
        except openai.OpenAIError:
            return ""
        return f"{did_you_mean(self.name, names)}; it has {', '.join(names[:10]) or 'none'}"


def connect(base_url: str, model: str, key_variable: str | None) -> Endpoint:
    """key_variable: the environment variable that holds the key. Nothing is sent yet. Raises ConfigError."""
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--base-url {base_url}: this is no URL such as http://localhost:8000/v1")
    if url.username or url.password:
        raise ConfigError("--base-url: leave the name and the password out of it; --api-key-env names a key's variable")
    key = NO_KEY
    if key_variable is not None:
        key = os.environ.get(key_variable, "")
        if not key:
            raise ConfigError(f"--api-key-env {key_variable}: there is no such environment variable, or it is empty")
    return Endpoint(model, base_url, openai.OpenAI(base_url=base_url, api_key=key, max_retries=0), key)
