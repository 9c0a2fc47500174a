"""The engine without text: an opened model, its scheduler and its loop, joined and running.

Owns what lives and dies together in the process that holds the device. Knows tokens only: the
Python API (engine.py) and the HTTP server put text on top.
"""

import itertools
import secrets
from pathlib import Path

from ernie_engine.config import ModelConfig
from ernie_engine.engine.block_pool import BlockPool
from ernie_engine.engine.intake import Intake
from ernie_engine.engine.loop import EngineLoop
from ernie_engine.engine.scheduler import Limits, Scheduler
from ernie_engine.engine_config import EngineConfig, ResolvedConfig
from ernie_engine.model.startup import open_model
from ernie_engine.text.generation import load_generation_defaults, stop_token_ids
from ernie_engine.text.templates import load_chat_template
from ernie_engine.text.tokenizer import load_tokenizer


class EngineCore:
    """A checkpoint being run: submit requests to `loop`. ValueError if it cannot be served."""

    def __init__(self, config: EngineConfig):
        opened = open_model(config)
        self.config, self.model_config = opened.config, opened.model_config
        self.num_kv_blocks = opened.runner.kv.num_blocks
        limits = Limits(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            block_size=self.config.block_size,
            enable_prefix_caching=self.config.enable_prefix_caching,
            enable_chunked_prefill=self.config.enable_chunked_prefill,
        )
        pool = BlockPool(self.num_kv_blocks)
        self.scheduler = Scheduler(limits, pool, digest_key=secrets.token_bytes(32))
        self.loop = EngineLoop(self.scheduler, opened.runner, self.config.max_steps_in_flight)

    def close(self) -> None:
        """End open requests (finish_reason "abort") and the loop. Twice does no harm."""
        self.loop.close()


def make_intake(config: ResolvedConfig, model_config: ModelConfig) -> Intake:
    """The text side of a checkpoint: tokenizer, chat template, sampling defaults.

    Needs the folder, not the model: it may live in another process than the core.
    """
    folder = Path(config.model)
    tokenizer = load_tokenizer(folder)
    defaults = load_generation_defaults(folder)
    return Intake(
        vocab_size=model_config.vocab_size,
        max_model_len=config.max_model_len,
        max_logprobs=config.max_logprobs,
        tokenizer=tokenizer,
        template=load_chat_template(folder, tokenizer),
        defaults=defaults,
        eos_ids=stop_token_ids(defaults, tokenizer, model_config.eos_token_ids),
        ids=itertools.count(),
    )
