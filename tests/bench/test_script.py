"""scripts/bench.py as people call it, and the picture it draws."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.bench.fake_server import FakeServer, plain
from tests.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("bench")


@pytest.fixture
def bench(script, monkeypatch, capsys):
    """Call it: (exit code, lines of output, last line as JSON or None)."""

    def call(*args: object):
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, args)])
        code = script.main()
        out, err = capsys.readouterr()
        report = json.loads(out.splitlines()[-1]) if code != 2 else None
        return code, out if code != 2 else err, report

    return call


SMALL = ("--num-prompts", 4, "--max-input-len", 12, "--max-output-len", 5)
LITTLE_CACHE = ("--device", "cpu", "--kv-cache-memory-bytes", 4 << 20)


def test_steps(bench, tiny):
    only = "b=1,b=1@32k,1x128"
    code, out, report = bench(
        *("--model", tiny, "--steps", "--only", only, "--num-tokens", 4, *LITTLE_CACHE)
    )
    assert code == 0
    assert "ms/step" in out and "4 new tokens instead of 256" in out
    assert "b=1@32k   skipped: 32004 tokens, max_model_len=512" in out
    assert report["bench"] == "steps"
    assert [c["case"] for c in report["cases"]] == ["b=1", "b=1@32k", "1x128"]
    assert report["ceilings"]["bytes_per_s"] > 0
    assert report["config"]["engine"]["enable_prefix_caching"] is False
    assert report["config"]["model"]["vocab_size"] == 700
    assert {"torch", "triton", "python", "ernie-engine"} <= report["versions"].keys()
    assert {"date", "command", "commit", "device", "driver"} <= report.keys()


def test_steps_are_traced_after_they_were_timed(bench, tiny, tmp_path):
    trace, only = tmp_path / "trace.json", "b=1,b=1@32k,1x128"
    code, out, report = bench(
        *("--model", tiny, "--steps", "--only", only, "--num-tokens", 8, *LITTLE_CACHE),
        *("--trace", trace),
    )
    assert code == 0 and "the host's phases only" in out
    decode, skipped, prefill = report["cases"]
    assert decode["trace"]["steps"] == 3 and decode["trace"]["gpu"] is None
    assert prefill["trace"]["steps"] == 1 and "trace" not in skipped
    events = json.loads(trace.read_text())["traceEvents"]
    assert [e["name"].split(": step")[0] for e in events if e["cat"] == "step"] == [
        *("b=1", "b=1", "b=1", "1x128")
    ]


def test_a_long_prompt_comes_in(bench, tiny):
    args = "--model", tiny, *LITTLE_CACHE, "--num-prompts", 3, "--max-input-len", 12
    code, out, report = bench(*args, "--max-output-len", 200, "--long-prompt", 300)
    assert code == 0 and "while it was read" in out and "p99" in out
    found = report["long_prompt"]
    assert found["prompt_len"] == 300 and found["ttft_ms"] > 0
    assert found["alone"]["count"] == found["interrupted"]["count"] == 3 * 199
    assert 0 < found["meanwhile"]["count"] < 3 * 199
    code, error, _ = bench(*args, "--long-prompt", 300, "--max-concurrency", 2)
    assert code == 2 and "all requests open at once" in error
    code, _, report = bench(*args, "--max-output-len", 2, "--request-rate", 5, "--long-prompt", 300)
    assert code == 1 and "nobody waited" in report["long_prompt"]["error"]
    assert report["runs"][0]["completed"] == 3
    with pytest.raises(SystemExit):
        bench("--model", tiny, "--steps", "--long-prompt", 300)


def test_dummy_weights_need_only_a_config(bench, tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    args = "--model", tmp_path, "--load-format", "dummy", *LITTLE_CACHE
    code, _, report = bench(*args, "--steps", "--only", "1x128")
    assert code == 0 and report["cases"][0]["ms"] > 0
    code, _, report = bench(*args, *SMALL)
    assert code == 0 and report["runs"][0]["total_output_tokens"] == 20


def test_runs_and_their_picture(bench, tiny, tmp_path):
    picture = tmp_path / "bench.png"
    code, out, report = bench(
        *("--model", tiny, *SMALL, "--max-concurrency", 1, 2, 4),
        *("--plot", picture, "--percentiles", 50, 90, *LITTLE_CACHE),
    )
    assert code == 0
    assert [run["max_concurrency"] for run in report["runs"]] == [1, 2, 4]
    assert "concurrency 2: 4 completed, 0 failed" in out and "p90" in out
    with Image.open(picture) as image:
        assert image.size[0] > 1000 and np.unique(np.asarray(image)).size > 50


def test_all_at_once_tells_the_share_of_the_ceiling(bench, tiny):
    code, out, report = bench("--model", tiny, *SMALL, "--goodput", "ttft:60000", *LITTLE_CACHE)
    (run,) = report["runs"]
    assert code == 0 and "of what the device allows" in out
    assert 0 < run["share_of_ceiling"] < 1
    assert run["request_goodput"] == run["request_throughput"]


def test_a_server(bench, tiny):
    with FakeServer() as server:
        url = "--base-url", server.url
        code, out, report = bench(*url, *SMALL, "--tokenizer", tiny, "--sampled")
    assert code == 0 and "4 completed, 0 failed" in out
    assert report["config"]["server"]["model"] == "m"
    assert report["runs"][0]["total_output_tokens"] == 20
    assert "share_of_ceiling" not in report["runs"][0]
    probe, *sent = server.requests
    assert len(sent) == 4 and probe["prompt"] not in [request["prompt"] for request in sent]
    assert all(len(request["prompt"]) == 12 for request in sent)
    for request in sent:
        assert (request["temperature"], request["top_p"]) == (0.8, 0.8)
        assert request["ignore_eos"] is True
        assert not {0, 1, 2} & set(request["prompt"])


def test_the_profile_of_the_seed_gives_way_to_flags(script):
    args = script._parse(["--model", "x", "--profile", "seed", "--num-prompts", "2"])
    assert (args.num_prompts, args.max_input_len, args.max_output_len) == (2, 1024, 1024)
    assert script._parse(["--model", "x", "--profile", "seed"]).num_prompts == 128


def test_a_server_that_refuses(bench, tiny):
    async def answer(_):
        yield plain("400 Bad Request", {"error": {"message": "ignore_eos is unknown"}})

    with FakeServer(answer) as server:
        code, err, _ = bench("--base-url", server.url, *SMALL, "--tokenizer", tiny)
    assert code == 2 and "probe" in err and "ignore_eos is unknown" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "/nowhere"], "is not a folder"),
        (["--model", "TINY", "--max-input-len", "511", "--max-output-len", "2"], "max_model_len"),
        (["--model", "TINY", "--steps", "--only", "b=3"], "b=3"),
        (["--model", "TINY", "--steps", "--trace", "/nowhere/t.json"], "no folder '/nowhere'"),
        (["--model", "TINY", "--request-rate", "0"], "request_rate"),
        (["--model", "TINY", "--goodput", "ttft"], "goodput"),
        (["--base-url", "http://127.0.0.1:1", "--tokenizer", "TINY"], "no server answers"),
    ],
)
def test_bad_input_is_an_error_that_names_it(bench, tiny, args, message):
    cpu = () if "--base-url" in args else LITTLE_CACHE
    code, err, _ = bench(*[str(tiny) if arg == "TINY" else arg for arg in args], *cpu)
    assert code == 2 and message in err


def test_a_trace_is_of_steps(bench, capsys):
    with pytest.raises(SystemExit):
        bench("--model", "x", "--trace", "t.json")
    assert "--trace needs --steps" in capsys.readouterr().err


def test_steps_are_not_for_servers(bench, capsys):
    with pytest.raises(SystemExit):
        bench("--base-url", "http://127.0.0.1:1", "--steps")
    assert "--steps needs --model" in capsys.readouterr().err
