"""Sessions: jobs that join while others run."""

import pytest

from ernie_engine import SamplingParams
from tests.tiny import open_engine


@pytest.fixture(scope="module")
def engine(tiny):
    with open_engine(tiny) as engine:
        yield engine


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)


def test_jobs_that_join_later_get_the_next_indices_and_their_own_answers(engine):
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    alone = [out.outputs[0].token_ids for out in engine.generate(prompts, params(6))]
    answers: dict[int, list[int]] = {}
    with engine.session() as session:
        session.add(engine.jobs(prompts[:1], params(6)))
        for index, piece in session:
            answers.setdefault(index, []).extend(piece.token_ids)
            if index == 0 and len(answers[0]) == 2:
                session.add(engine.jobs(prompts[1:], params(6)))
    assert [answers[i] for i in range(3)] == alone


def test_poll_says_none_when_nothing_comes_in_time_and_when_all_is_over(engine):
    with engine.session() as session:
        assert session.poll(None) is None  # nothing is open
        session.add(engine.jobs([[5]], params(200)))
        items = [session.poll(0.0)]  # too early, as a rule: it must not wait
        while len(items) < 200 + items.count(None):
            items.append(session.poll(1.0))
        assert items[-1] is not None and items[-1][1].finish_reason == "length"
        assert session.poll(None) is None


def test_a_job_that_cannot_be_answered_leaves_the_session_as_it_was(engine):
    with engine.session() as session:
        session.add(engine.jobs([[5]], params(3)))
        with pytest.raises(ValueError, match="vocabulary"):
            session.add(engine.jobs([[10**6]], params(3)))
        assert sum(len(piece.token_ids) for _, piece in session) == 3
