"""Who answers: an `Answerer` takes conversations and returns one answer each, greedily.

Here are the two that any model can stand behind: an engine that is handed in, and an
OpenAI-compatible URL. Never score here.
"""

import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, str]  # {"role": ..., "content": ...}


class Answerer(Protocol):
    def __call__(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int
    ) -> list[str]: ...


@dataclass(frozen=True)
class EngineAnswerer:
    """An engine with `chat(conversations, params)`, and the class of its sampling parameters."""

    engine: Any
    sampling_params: Callable[..., Any]

    def __call__(self, conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
        params = self.sampling_params(temperature=0.0, max_tokens=max_tokens)
        outputs = self.engine.chat(list(conversations), params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


@dataclass(frozen=True)
class UrlAnswerer:
    """`base_url` ends in /v1; `concurrency` requests are open at once; an HTTP error is raised."""

    base_url: str
    model: str
    api_key: str = "EMPTY"
    concurrency: int = 16
    timeout: float = 300.0  # seconds

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: {self.base_url!r} must begin with http:// or https://")

    def __call__(self, conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(
                pool.map(lambda messages: self._answer(messages, max_tokens), conversations)
            )

    def _answer(self, messages: Sequence[Message], max_tokens: int) -> str:
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": False,
        }
        request = urllib.request.Request(
            self.base_url.rstrip("/") + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"},
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.load(response)["choices"][0]["message"]["content"] or ""
