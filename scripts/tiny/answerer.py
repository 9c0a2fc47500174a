"""transformers as an answerer: its own tokenizer, template, model code and greedy generation.

The reference that the engine is compared with, and the check of a fresh checkpoint. Never scores.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ernie_engine.evals.transport import Message

_TOKENS_AT_ONCE = 131072


class TransformersAnswerer:
    """A checkpoint folder through `from_pretrained`; implements `ernie_engine.evals` Answerer."""

    def __init__(self, folder: Path, dtype: str, device: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation="eager"
        )
        self.model.to(device)

    def __call__(self, conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
        prompts = [self._prompt(messages) for messages in conversations]
        answers = [""] * len(prompts)
        for chunk in _chunks(prompts):
            texts = self._generate([prompts[i] for i in chunk], max_tokens)
            for i, text in zip(chunk, texts, strict=True):
                answers[i] = text
        return answers

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        batch = batch.to(self.model.device)
        ids = self.model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
        new = ids[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


def _chunks(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Indices of prompts of like length, so many at once as `_TOKENS_AT_ONCE` allows."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) + 1) * len(prompts[i]) > _TOKENS_AT_ONCE:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
