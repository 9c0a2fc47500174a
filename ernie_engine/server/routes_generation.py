"""POST /v1/completions and /v1/chat/completions: from a request's bytes to its reply.

Owns the order of things: validate, admit, tokenize, submit. Everything that can be refused is
refused here, with a real status, before any header has gone out.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from starlette.requests import Request

from ernie_engine.engine.intake import Job
from ernie_engine.server.body import parse_object, read_body
from ernie_engine.server.calls import Call, read_chat, read_completion
from ernie_engine.server.fields import read_fields
from ernie_engine.server.front import FrontEnd
from ernie_engine.server.prepare import make_jobs
from ernie_engine.server.protocol import ChatCompletionRequest, CompletionRequest
from ernie_engine.server.rendering import PromptAnswer
from ernie_engine.server.served import ServedModel
from ernie_engine.server.session import Session
from ernie_engine.server.streaming import Answer, Head, Reply, Usage

logger = logging.getLogger(__name__)
SMALL_BODY = 64 << 10  # bytes; a larger one is parsed off the event loop
USAGE_HEADER = "x-usage-on-finish"
T = TypeVar("T")


class GenerationRoutes:
    def __init__(self, front: FrontEnd):
        self._front = front
        self._logged_fields: set[str] = set()

    async def completions(self, request: Request) -> Reply:
        return await self._reply(request, is_chat=False)

    async def chat_completions(self, request: Request) -> Reply:
        return await self._reply(request, is_chat=True)

    async def _reply(self, request: Request, is_chat: bool) -> Reply:
        front = self._front
        front.require_ready()
        ends = ExitStack()  # what is to be undone, here at an error, else when the reply is over
        try:
            ends.enter_context(front.active_call())
            body = await read_body(request)
            served = front.require_ready()
            reading = front.in_thread if len(body) > SMALL_BODY else _at_once
            call, unknown = await reading(self._read, body, served, is_chat)
            ticket = front.admission.admit(call.num_requests)
            ends.callback(ticket.release)
            jobs = await front.in_thread(make_jobs, call, served, ticket)
            session = front.client.submit(jobs, ticket)
            ends.callback(front.client.close, session)
        except BaseException:
            ends.close()
            raise
        self._observe(call, jobs)
        answer = self._answer(call, jobs, session, served, request)
        headers = {"X-Ignored-Fields": unknown} if unknown else {}
        return Reply(answer, call.stream, request.state.request_id, headers, ends.close)

    def _answer(
        self, call: Call, jobs: list[Job], session: Session, served: ServedModel, request: Request
    ) -> Answer:
        answer_id = ("chatcmpl-" if call.is_chat else "cmpl-") + request.state.request_id
        head = Head(answer_id, int(time.time()), call.model, served.fingerprint)
        prompts = [
            PromptAnswer(call, job, served.tokenizer, index * call.params.n)
            for index, job in enumerate(jobs)
        ]
        usage = Usage(sum(len(job.output.prompt_token_ids) for job in jobs))
        asked = self._front.settings.server.usage_on_finish or USAGE_HEADER in request.headers
        return Answer(call, head, prompts, session, usage, usage_on_finish=asked)

    def _read(self, body: bytes, served: ServedModel, is_chat: bool) -> tuple[Call, str]:
        """The call, and the unknown fields that it had."""
        data, strict = parse_object(body), self._front.settings.server.strict_fields
        if is_chat:
            asked, unknown = read_fields(ChatCompletionRequest, data, strict)
            call = read_chat(asked, self._front.model_name(asked.model), served.limits)
        else:
            asked, unknown = read_fields(CompletionRequest, data, strict)
            call = read_completion(asked, self._front.model_name(asked.model), served.limits)
        if unknown and unknown not in self._logged_fields and len(self._logged_fields) < 100:
            self._logged_fields.add(unknown)
            logger.info("unknown request fields are ignored: %s", unknown)
        return call, unknown

    def _observe(self, call: Call, jobs: list[Job]) -> None:
        observe = self._front.metrics.observe
        for job in jobs:
            first = job.requests[0]
            observe("request_params_n", call.params.n)
            max_tokens = first.max_total_tokens - len(first.token_ids)
            observe("request_params_max_tokens", max_tokens)


async def _at_once(function: Callable[..., T], *args: Any) -> T:
    return function(*args)
