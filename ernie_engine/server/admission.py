"""How much may be in the server at once: requests (each choice counts) and unread prompt tokens.

Owns the two sums. Everything is charged before it is copied; what does not fit is a 503 at once.
"""

import threading

from ernie_engine.server.errors import bad_request, unavailable
from ernie_engine.server.metrics import Metrics


class Admission:
    """Tickets may be charged from several threads."""

    def __init__(self, max_requests: int, max_tokens: int, metrics: Metrics):
        self._max_requests, self._max_tokens, self._metrics = max_requests, max_tokens, metrics
        self._lock = threading.Lock()
        self.num_requests = self.num_tokens = 0

    def admit(self, num_requests: int) -> "Ticket":
        """Room for a call with that many choices over all its prompts, or ApiError."""
        if num_requests > self._max_requests:
            raise bad_request(
                f"n: {num_requests} choices over all prompts; this server takes at most "
                f"{self._max_requests} at once",
                "n",
            )
        with self._lock:
            if self.num_requests + num_requests > self._max_requests:
                self._metrics.rejected["requests"] += 1
                raise unavailable("Too many requests are waiting. Try again later.")
            self.num_requests += num_requests
        return Ticket(self, num_requests)

    def add_tokens(self, num_tokens: int) -> None:
        if num_tokens > self._max_tokens:
            raise bad_request(
                f"prompt: {num_tokens} tokens over all prompts and choices; this server takes at "
                f"most {self._max_tokens} at once",
                "prompt",
            )
        with self._lock:
            if num_tokens > 0 and self.num_tokens + num_tokens > self._max_tokens:
                self._metrics.rejected["tokens"] += 1
                raise unavailable("Too many prompt tokens are waiting. Try again later.")
            self.num_tokens += num_tokens

    def release(self, num_requests: int) -> None:
        with self._lock:
            self.num_requests -= num_requests


class Ticket:
    """What one call holds; release() gives back what is left of it, twice does no harm."""

    def __init__(self, admission: Admission, num_requests: int):
        self._admission, self.num_requests = admission, num_requests
        self._num_tokens = 0

    def charge(self, num_tokens: int) -> None:
        """Prompt tokens that will have to be read, or ApiError."""
        self._admission.add_tokens(num_tokens)
        self._num_tokens += num_tokens

    def give_back(self, num_tokens: int) -> None:
        """They have been read."""
        self._admission.add_tokens(-num_tokens)
        self._num_tokens -= num_tokens

    def release(self) -> None:
        self.give_back(self._num_tokens)
        self._admission.release(self.num_requests)
        self.num_requests = 0
