"""The engine without text: an opened model, its scheduler and its loop, joined and running.

Owns what lives and dies together in the process that holds the device. Knows tokens only: the
Python API (engine.py) and the HTTP server put text on top.
"""

import itertools
import logging
import secrets
import sys
from pathlib import Path

from ernie_engine.config import ModelConfig
from ernie_engine.engine.block_pool import BlockPool
from ernie_engine.engine.intake import Intake
from ernie_engine.engine.loop import EngineLoop
from ernie_engine.engine.phases import Phases
from ernie_engine.engine.ranks import gather_ranks
from ernie_engine.engine.scheduler import Limits, Scheduler
from ernie_engine.engine_config import ResolvedConfig
from ernie_engine.model.startup import Description, describe
from ernie_engine.text.generation import load_generation_defaults, stop_token_ids
from ernie_engine.text.templates import load_chat_template
from ernie_engine.text.tokenizer import load_tokenizer

__all__ = ["Description", "EngineCore", "describe", "make_intake"]

logger = logging.getLogger(__name__)
LOST_SECONDS = 5.0  # for the thread of a loop that has failed: a lost rank is ended meanwhile


class EngineCore:
    """A checkpoint being run: submit requests to `loop`. ValueError if it cannot be served."""

    def __init__(self, description: Description):
        self.config, self.model_config = description.config, description.model_config
        self.phases = Phases()
        self.ranks, runner = gather_ranks(description, self.phases)
        self.num_kv_blocks, self.ops = runner.kv.num_blocks, runner.ops
        self._graphs = runner.graphs
        self._calls_untold = self.config.log_kernels
        limits = Limits(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            block_size=self.config.block_size,
            enable_prefix_caching=self.config.enable_prefix_caching,
            enable_chunked_prefill=self.config.enable_chunked_prefill,
            num_stages=self.config.pipeline_parallel_size,
        )
        pool = BlockPool(self.num_kv_blocks)
        rooms = runner.graphs.rooms()
        self.scheduler = Scheduler(limits, pool, secrets.token_bytes(32), rooms)
        depth, replays = self.config.max_steps_in_flight, bool(rooms)
        self.loop = EngineLoop(self.scheduler, self.ranks, depth, self.phases, replays)
        self.ranks.on_failure(self.loop.fail)
        self.is_held = False  # a thread hangs in a step and will not end

    @property
    def num_compilations(self) -> int:
        """Kernels that all ranks have taken up: once they serve, no more should come."""
        return self.ranks.num_compilations

    @property
    def num_graphs(self) -> int:
        """Those recorded so far."""
        return len(self._graphs)

    def close(self) -> None:
        """End open requests (finish_reason "abort"), the loop and the other ranks. Twice does no
        harm."""
        self.is_held = not self.loop.close(LOST_SECONDS if self.loop.is_dead else None)
        if self.is_held:
            logger.error("a step waits for a lost rank, perhaps for ever: it is left alone")
        self.ranks.close(self.is_held)
        if self._calls_untold:
            self._calls_untold = False
            print(self.ops.call_table(), file=sys.stderr)


def make_intake(config: ResolvedConfig, model_config: ModelConfig) -> Intake:
    """The text side of a checkpoint: tokenizer, chat template, sampling defaults.

    Needs the folder, not the model: it may live in another process than the core.
    """
    folder = Path(config.model)
    tokenizer = load_tokenizer(folder)
    defaults, vocab_size = load_generation_defaults(folder), model_config.vocab_size
    eos_ids = stop_token_ids(defaults, tokenizer, model_config.eos_token_ids)
    if strange := sorted(i for i in eos_ids if i >= vocab_size):
        logger.warning("end-of-sequence ids %s lie outside the vocabulary: ignored", strange)
    return Intake(
        vocab_size=vocab_size,
        max_model_len=config.max_model_len,
        max_logprobs=config.max_logprobs,
        longest_token=tokenizer.longest_token if tokenizer else 1,
        tokenizer=tokenizer,
        template=load_chat_template(folder, tokenizer),
        defaults=defaults,
        eos_ids=eos_ids.difference(strange),
        ids=itertools.count(),
    )
