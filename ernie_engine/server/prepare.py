"""A checked call -> jobs for the engine: template, tokenizer, charge, copies, in this order.

Runs in a thread of its own, for a prompt may be long. Submits nothing.
"""

from collections.abc import Iterator

from ernie_engine.engine.intake import Job
from ernie_engine.server.admission import Ticket
from ernie_engine.server.calls import Call
from ernie_engine.server.errors import from_value_error
from ernie_engine.server.protocol import ChatCompletionRequest, CompletionRequest
from ernie_engine.server.served import ServedModel

_FIELDS = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}


def make_jobs(call: Call, served: ServedModel, ticket: Ticket) -> list[Job]:
    """A job for each prompt; ApiError if one cannot be answered or there is no room for all."""
    jobs = []
    try:
        for text, tokens in _tokenized(call, served):
            ticket.charge(len(tokens) * call.params.n)
            job = served.intake.job(tokens, call.params, call.default_max_tokens)
            job.output.prompt = text
            jobs.append(job)
    except ValueError as error:
        raise from_value_error(error, _FIELDS, served.config.max_model_len) from error
    return jobs


def _tokenized(call: Call, served: ServedModel) -> Iterator[tuple[str | None, list[int]]]:
    """(text if there was one, token ids) of each prompt."""
    if call.is_chat:
        options = {"add_generation_prompt": call.add_generation_prompt}
        yield None, served.intake.encode_chat(call.messages, **options)
    for prompt in call.prompts:
        yield (prompt if isinstance(prompt, str) else None), served.intake.encode(prompt)
