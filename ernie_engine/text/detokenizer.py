"""Token ids to text while they arrive, and the search for stop strings in that text.

Owns what is held back: half a character, a possible beginning of a stop string. Never looks at
a token twice.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenTable(Protocol):
    """What the detokenizer asks of a tokenizer."""

    strips_leading_space: bool

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...


class IncrementalDetokenizer:
    """The text of one sequence, piece by piece: never half a character."""

    def __init__(self, tokenizer: TokenTable, skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True  # of the text or after a special token

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that `token_ids` complete."""
        return self._decoder.decode(b"".join(map(self._bytes, token_ids)))

    def finish(self) -> str:
        """The rest: an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id)
        special = self._tokenizer.is_special(token_id)
        if self._at_start and self._tokenizer.strips_leading_space:
            data = data.removeprefix(b" ")
        self._at_start = special
        return b"" if special and self._skip else data


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces.

    The match that ends first wins, and of those that end together the longest: so the answer does
    not depend on how the text was cut. Aho and Corasick's automaton ("Efficient string matching",
    CACM 1975): time is linear in the text, and the depth of its state is exactly the longest
    suffix of the text that begins some stop string.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool):
        """ValueError if a stop string is empty."""
        self._include = include_in_output
        self._next: list[dict[str, int]] = [{}]  # state, character -> deeper state
        self._depth = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends in this state
        for stop in stops:
            self._add(stop)
        self._fallback = self._fallbacks()
        self._state, self._held, self._found = 0, "", False

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was found or None).

        After a match the text ends, before it or (include_in_output) behind it.
        """
        assert not self._found, "the text has ended at a stop string"
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            self._state = self._step(char)
            stop = self._match[self._state]
            if stop is not None:
                self._found, self._held = True, ""
                return pending[: end if self._include else end - len(stop)], stop
        shown = len(pending) - (0 if self._include else self._depth[self._state])
        self._held = pending[shown:]
        return pending[:shown], None

    def finish(self) -> str:
        """What was held back, when the text ends otherwise."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        state = self._state
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)

    def _add(self, stop: str) -> None:
        if not stop:
            raise ValueError("stop: a stop string must not be empty")
        state = 0
        for depth, char in enumerate(stop, 1):
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._match.append(None)
            state = self._next[state][char]
        self._match[state] = stop

    def _fallbacks(self) -> list[int]:
        """For each state the state of its longest proper suffix; hands shorter matches on."""
        fallback = [0] * len(self._next)
        states = deque(self._next[0].values())
        while states:  # by depth
            parent = states.popleft()
            for char, child in self._next[parent].items():
                state = fallback[parent]
                while state and char not in self._next[state]:
                    state = fallback[state]
                fallback[child] = self._next[state].get(char, 0)
                self._match[child] = self._match[child] or self._match[fallback[child]]
                states.append(child)
        return fallback
