"""/metrics against what was asked: counts, sums, gauges, closed label sets."""

import itertools
import random
import re

import pytest

from ernie_engine.server.metrics import Histogram
from tests.server.process import Served


@pytest.fixture(scope="module")
def fresh(tiny, tmp_path_factory):
    """A server of its own: its counters begin at 0. With another prefix, for boards of peers."""
    log = tmp_path_factory.mktemp("fresh") / "log"
    flags = ["--metrics-prefix", "vllm", "--served-model-name", "tiny", "other/name"]
    with Served(tiny, log, *flags, "--no-enable-prefix-caching") as served:
        yield served


def test_ten_requests_of_ten_tokens(fresh):
    for _ in range(10):
        answer = fresh.complete([5, 6, 7, 8, 9], max_tokens=10, ignore_eos=True)
        assert answer.status_code == 200
    fresh.wait_idle()
    expected = {
        "prompt_tokens_total": 50,
        "prompt_tokens_cached_total": 0,
        "generation_tokens_total": 100,
        "time_to_first_token_seconds_count": 10,
        "inter_token_latency_seconds_count": 90,
        "iteration_tokens_total_count": 100,
        "iteration_tokens_total_sum": 150,
        "request_prompt_tokens_sum": 50,
        "request_generation_tokens_sum": 100,
        "request_max_num_generation_tokens_sum": 100,
        "request_params_n_sum": 10,
        "request_params_max_tokens_sum": 100,
        "request_num_preemptions_sum": 0,
        "num_preemptions_total": 0,
        "kernel_compilations_total": 0,
        "cuda_graph_captures_total": 0,
    }
    for name, value in expected.items():
        assert fresh.metric(name) == value, name
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert fresh.metric(f"{name}_seconds_count") == 10
    for name in ("request_decode_time", "request_inference_time", "request_time_per_output_token"):
        assert fresh.metric(f"{name}_seconds_count") == 10
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time")
    whole = fresh.metric("e2e_request_latency_seconds_sum")
    assert sum(fresh.metric(f"{name}_seconds_sum") for name in parts) == pytest.approx(whole)
    assert fresh.metric("request_success_total", finished_reason="length") == 10
    fresh.wait_metric("prefix_cache_queries_total", 50)


def test_stop_strings_leave_no_trace_of_later_tokens(fresh):
    before = fresh.metric("generation_tokens_total")
    body = {"prompt": "The engine", "temperature": 0, "ignore_eos": True}
    text = fresh.complete(**body, max_tokens=30).json()["choices"][0]["text"]
    stopped = fresh.complete(**body, max_tokens=30, stop=text[8:11]).json()
    fresh.wait_idle()
    counted = fresh.metric("generation_tokens_total") - before
    assert counted == 30 + stopped["usage"]["completion_tokens"]
    assert fresh.metric("request_success_total", finished_reason="stop") == 1


def test_labels_come_from_closed_sets(fresh):
    for path in ("/nope", "/also/nope", "/v1/models/x"):
        fresh.http.get(path)
    text = fresh.http.get("/metrics").text
    assert fresh.metric("http_requests_total", handler="other", status="404") == 2
    assert 'handler="/v1/models/{model:path}"' in text and "nope" not in text
    assert (
        'model_name="tiny"' in text
        and 'engine="0"' in text
        and "vllm:num_requests_running{" in text
    )
    assert (
        fresh.http.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    )
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(
            r'[a-z0-9_:]+(\{([a-z_]+="[^"]*",?)*\})? [0-9.e+-]+', line
        )
    assert fresh.metric("cache_config_info", block_size="16", num_gpu_blocks="256") == 1


def test_served_names(fresh):
    models = fresh.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "other/name"]
    assert all(model["root"] == fresh.model for model in models)
    for name in ("tiny", "other/name"):
        assert fresh.complete("x", model=name, max_tokens=1).json()["model"] == name
        assert fresh.http.get(f"/v1/models/{name}").json()["id"] == name
    assert fresh.complete("x", model=fresh.model).status_code == 404
    assert fresh.complete("x", max_tokens=1).json()["model"] == "tiny"


def test_histogram_buckets_are_cumulative():
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 5, 6):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("5.0", 5), ("+Inf", 6)]
    assert histogram.total == 16


# What a request may ask for, so that kernels of all kinds are needed.
VARIETY = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.8, "n": 3},
    {"temperature": 1, "top_k": 5, "min_p": 0.1, "stream": True},
    {"temperature": 0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.8, "logit_bias": {"7": 2.0}, "min_tokens": 2},
    {"temperature": 0.8, "logprobs": 5},
    {"temperature": 0, "logprobs": 2, "echo": True},
    {"temperature": 0.8, "top_p": 0.9, "prompt_logprobs": 3},
)


def ask_for_all_sorts(served: Served) -> None:
    """Many prompts at once, then ones of all lengths, each with what follows it."""
    rng, variety = random.Random(4), itertools.cycle(VARIETY)

    def ask(prompts: list[list[int]]) -> None:
        fields = {"max_tokens": rng.randint(2, 9), "ignore_eos": True}
        answer = served.complete(prompts, **fields, **next(variety))
        assert answer.status_code == 200, answer.text

    def prompt(length: int) -> list[int]:
        return [rng.randrange(700) for _ in range(length)]

    for count in (1, 2, 3, 5, 8, 9, 17, 31, 33, 40):
        for _ in range(2):
            ask([prompt(rng.randint(1, 60)) for _ in range(count)])
    for length in (1, 2, 3, 7, 8, 16, 17, 64, 65, 129, 255, 257, 400, 490):
        text = prompt(length)
        for behind in (0, 3):
            ask([text + prompt(behind)])


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_no_kernel_is_compiled_once_it_is_ready(tiny, tmp_path):
    """Neither for requests nor for graphs, most of which are recorded later."""
    flags = ["--device", "cuda", "--max-num-seqs", "40", "--max-num-batched-tokens", "700"]
    with Served(tiny, tmp_path / "log", *flags, start_seconds=600) as served:
        served.wait_idle()  # the engine has told its state
        before = served.metric("kernel_compilations_total")
        assert before > 20
        ask_for_all_sorts(served)
        served.wait_text("CUDA graphs: ", 300)
        served.wait_idle()
        assert served.metric("cuda_graph_captures_total") > 5
        assert served.metric("kernel_compilations_total") == before
