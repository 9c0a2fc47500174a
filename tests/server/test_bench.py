"""One workload, measured in process and through HTTP: the benchmark agrees with itself, and with
what the server counted.
"""

from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.serving import measure, run_row
from ernie_engine.bench.targets import ServerOptions, engine_target, server_target
from ernie_engine.bench.workload import GREEDY, WorkloadSpec, probe_request
from tests.tiny import open_engine

SPEC = WorkloadSpec(
    num_prompts=12, min_input_len=8, max_input_len=40, min_output_len=6, max_output_len=30
)
SAMPLING = {**GREEDY, "ignore_eos": True}


def rows(target) -> list[dict]:
    runs = measure(target.driver, SPEC, target.ids, [1, 4], progress=False)
    return [run_row(run, [99], None) for run in runs]


def test_offline_and_http_agree(served, tiny):
    counted = served.metric("generation_tokens_total")
    remote = server_target(served.url, None, ServerOptions(), SPEC, SAMPLING)
    over_http = rows(remote)
    counted = served.metric("generation_tokens_total") - counted
    with open_engine(tiny, enable_prefix_caching=False) as engine:
        local = engine_target(engine, SPEC, Ceilings(1.0, 1.0), SAMPLING)
        in_process = rows(local)
    assert (remote.ids == local.ids).all()
    exact = "completed failed total_input_tokens total_output_tokens asked_output_tokens errors"
    for here, there in zip(in_process, over_http, strict=True):
        assert here["completed"] == 12
        assert [here[key] for key in exact.split()] == [there[key] for key in exact.split()]
        for figure in ("output_throughput", "mean_tpot_ms", "mean_e2el_ms"):  # two busy cores
            assert 0.2 < there[figure] / here[figure] < 5
    probe = probe_request(SPEC, remote.ids).output_len
    assert counted == probe + sum(row["total_output_tokens"] for row in over_http)
