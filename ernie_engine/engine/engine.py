"""Engine: the Python API. Loads a checkpoint, owns the loop, turns prompts into answers.

Non-streaming is a fold over streaming. Text is made in the caller's thread, steps in the loop's.
"""

import logging
import queue
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from ernie_engine.engine.assembler import ChoiceAssembler
from ernie_engine.engine.core import EngineCore, make_intake
from ernie_engine.engine.intake import Intake, Job, Message, Prompt
from ernie_engine.engine.loop import EngineDeadError, EngineLoop
from ernie_engine.engine.phases import Phases
from ernie_engine.engine.request import Piece, RequestOutput, SamplingParams, TokenOutput
from ernie_engine.engine.worker import describe_rank, serve_rank
from ernie_engine.engine_config import EngineConfig

logger = logging.getLogger("ernie_engine")


class Engine:
    """An ERNIE-4.5 checkpoint being served to this process.

    Args: `model`, the checkpoint's folder, and every field of EngineConfig by keyword.
    Raises ValueError for a checkpoint or a configuration that cannot be served, saying why.
    Methods may be called from several threads. Use it in a `with` block, or close() it.

    With tensor_parallel_size or pipeline_parallel_size this process is rank 0 and starts the
    others. Under torchrun all ranks call Engine() alike: above rank 0 the call works for rank 0
    and returns when that closes; only rank 0 (`engine.rank`) can then ask for anything.
    """

    def __init__(self, model: str | Path, **fields: Any):
        _show_log()
        description = describe_rank(EngineConfig(model=str(model), **fields))
        self.config, self.model_config = description.config, description.model_config
        self.rank = description.world.rank
        self._opened: tuple[Intake, EngineCore] | None = None
        if self.rank > 0:
            serve_rank(description)
            return
        intake = make_intake(self.config, self.model_config)
        self._opened = intake, EngineCore(description)
        try:
            self._loop.settle()  # speed from the first answer on; a server answers meanwhile
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        self.tokenizer, self.num_kv_blocks = intake.tokenizer, self._core.num_kv_blocks

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts (text or token ids; one or a list); answers in the prompts' order.

        `params`: one for all, or one each. Raises ValueError before anything runs if one of them
        cannot be answered, EngineDeadError if the engine ends meanwhile.
        """
        return self._run(self.jobs(prompts, params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them; a message is {role, content}."""
        if not isinstance(messages, Sequence):
            raise ValueError("messages must be a list of {role, content} objects, or of such lists")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if several else [messages]
        pairs = zip(conversations, _one_each(params, len(conversations)), strict=True)
        jobs = [self._intake.chat_job(m, p, **template_options) for m, p in pairs]  # pyright: ignore[reportArgumentType]
        return self._run(jobs, use_tqdm)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> "Stream":
        """The pieces of one prompt's answers as they come. Closing it aborts the request."""
        return Stream(self._loop, self._intake.job(prompt, params or SamplingParams()))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        **template_options: Any,
    ) -> "Stream":
        """As stream(), for one conversation."""
        job = self._intake.chat_job(messages, params or SamplingParams(), **template_options)
        return Stream(self._loop, job)

    def jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Job]:
        """Prompts checked and ready for Session.add(); arguments and errors as in generate()."""
        prompt_list = _listed(prompts)
        pairs = zip(prompt_list, _one_each(params, len(prompt_list)), strict=True)
        return [self._intake.job(prompt, p) for prompt, p in pairs]

    def session(self) -> "Session":
        """Answers that run side by side, and that jobs can join at any time; for one thread."""
        return Session(self._loop, [])

    def close(self) -> None:
        """End open requests (finish_reason "abort"), the loop and the other ranks. Twice does no
        harm."""
        if self._opened is not None:
            self._core.close()

    @property
    def phases(self) -> Phases:
        """What the loop is doing, for a watcher."""
        return self._core.phases

    @property
    def _intake(self) -> Intake:
        if self._opened is None:
            raise EngineDeadError(
                f"this is rank {self.rank}, which has worked for rank 0 and is done: "
                "ask for answers only where engine.rank == 0"
            )
        return self._opened[0]

    @property
    def _core(self) -> EngineCore:
        assert self._intake and self._opened is not None
        return self._opened[1]

    @property
    def _loop(self) -> EngineLoop:
        return self._core.loop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, jobs: list[Job], use_tqdm: bool) -> list[RequestOutput]:
        session = Session(self._loop, jobs)
        num_tokens, num_open = 0, {i: len(job.requests) for i, job in enumerate(jobs)}
        bar = tqdm(total=len(jobs), unit="prompt", delay=1.0, disable=not use_tqdm, leave=False)
        with session, bar:
            for index, piece in session:
                jobs[index].output.add(piece)
                num_tokens += len(piece.token_ids)
                if piece.finish_reason is not None:
                    num_open[index] -= 1
                    bar.update(num_open[index] == 0)
                if use_tqdm:  # this thread's Python competes with the loop's
                    elapsed = bar.format_dict["elapsed"]
                    bar.set_postfix_str(f"{num_tokens / max(elapsed, 1e-9):.0f} tokens/s", False)
        return [job.output for job in jobs]


class Session:
    """The running answers of some jobs, in the order they were added from 0 on: yields (job's
    index, piece) until all have ended. close() aborts the rest."""

    def __init__(self, loop: EngineLoop, jobs: Sequence[Job]):
        self._loop = loop
        self._sink: queue.SimpleQueue[Sequence[TokenOutput] | EngineDeadError] = queue.SimpleQueue()
        self._came: deque[TokenOutput] = deque()
        self._open: dict[int, tuple[int, ChoiceAssembler]] = {}
        self._num_jobs = 0
        self.add(jobs)

    def add(self, jobs: Sequence[Job]) -> None:
        """Submit more, all at once; EngineDeadError, and nothing added, if that cannot be."""
        self._loop.submit([request for job in jobs for request in job.requests], self._sink)
        for index, job in enumerate(jobs, start=self._num_jobs):
            for request, assembler in zip(job.requests, job.assemblers, strict=True):
                self._open[request.request_id] = index, assembler
        self._num_jobs += len(jobs)

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        return self

    def __next__(self) -> tuple[int, Piece]:
        if (item := self.poll(None)) is None:
            raise StopIteration
        return item

    def poll(self, timeout: float | None) -> tuple[int, Piece] | None:
        """What comes next; None if nothing is open, or nothing comes within `timeout` seconds."""
        while self._open:
            output = self._next_output(timeout)
            if output is None:
                return None
            if output.request_id not in self._open:
                continue  # drawn after a stop string had ended the answer
            index, assembler = self._open[output.request_id]
            piece = assembler.push(output)
            if assembler.ended:
                del self._open[output.request_id]
                if output.finish_reason is None:
                    self._loop.abort([output.request_id])
            return index, piece
        return None

    def _next_output(self, timeout: float | None) -> TokenOutput | None:
        while not self._came:
            try:
                batch = self._sink.get(timeout=timeout)
            except queue.Empty:
                return None
            if isinstance(batch, EngineDeadError):
                self._open.clear()
                raise EngineDeadError(str(batch)) from batch.__cause__
            self._came.extend(batch)
        return self._came.popleft()

    def close(self) -> None:
        if self._open:
            self._loop.abort(list(self._open))
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[Piece]):
    """The pieces of one prompt's answers. Closed (or dropped) early, it aborts the request."""

    def __init__(self, loop: EngineLoop, job: Job):
        self.prompt_token_ids = job.output.prompt_token_ids
        self._session: Session | None = None  # so that __del__ finds it if the next line fails
        self._session = Session(loop, [job])

    def __next__(self) -> Piece:
        assert self._session is not None
        return next(self._session)[1]

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one. A list of integers is one prompt of token ids."""
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be text, token ids or a list of them, not {prompts!r:.200}")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | float)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"params: {len(params)} given for {count} prompts; give one, or one each")
    return params


def _show_log() -> None:
    """Start-up lines reach people who set up no logging of their own."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
