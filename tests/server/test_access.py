"""Keys, hosts and web pages: who may ask, on every route there is."""

import asyncio

import pytest

from ernie_engine.server import auth
from ernie_engine.server.errors import ApiError
from ernie_engine.server.gate import OPEN_PATHS
from ernie_engine.server.settings import KEY_VARIABLE, ServerConfig, Settings, make_settings
from tests.server.in_process import InProcess, get


def routes_of(here: InProcess) -> list[tuple[str, str]]:
    routes = here.app._app.routes
    return [(method, route.path) for route in routes for method in route.methods]


def test_every_route_needs_the_key_but_the_open_ones(tiny):
    here = InProcess(tiny, keys=["secret", "other"])
    routes = routes_of(here)
    assert len(routes) > 30 and ("POST", "/v1/completions") in routes

    async def ask() -> None:
        for method, path in [*routes, ("GET", "/nope"), ("GET", "//health"), ("GET", "/health/")]:
            path = path.replace("{model:path}", "x")
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "secret"},
                {"Authorization": "Basic secret"},
            ):
                answer = await here.http.request(method, path, headers=header)
                if path in OPEN_PATHS:
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                error = answer.json()["error"]
                assert error["type"] == "AuthenticationError" and error["code"] == 401
            for key in ("Bearer secret", "bearer other", "BEARER  secret "):
                answer = await here.http.request(method, path, headers={"Authorization": key})
                assert answer.status_code != 401, (method, path)

    asyncio.run(ask())


def test_metrics_can_be_opened(tiny):
    assert get(tiny, "/metrics", keys=["secret"], metrics_without_key=True).status_code == 200
    assert get(tiny, "/info", keys=["secret"], metrics_without_key=True).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer ", "Bearer EMPTY", "Bearer None", "Basic x"])
def test_without_keys_any_header_is_fine(tiny, header):
    headers = {"Authorization": header}
    assert get(tiny, "/v1/models", headers=headers).status_code == 200


def test_all_keys_are_compared_as_digests(monkeypatch):
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    settings = make_settings(ServerConfig(api_key=("a", "b", "c")), "m", 1, {})
    auth.check_key("Bearer a", settings.key_digests)
    assert len(compared) == 3 and all(len(a) == len(b) == 64 for a, b in compared)
    with pytest.raises(ApiError):
        auth.check_key("Bearer \udcff", settings.key_digests)


def test_keys_come_from_file_and_environment_and_leave_as_digests(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    config = ServerConfig(api_key=("three",), api_key_file=str(file))
    settings = make_settings(config, "m", 1, {KEY_VARIABLE: "four"})
    for key in ("one", "two", "three", "four"):
        auth.check_key(f"Bearer {key}", settings.key_digests)
    told = str(settings.to_json())
    assert not any(key in told for key in ("one\\n", "'three'", "four", str(file)))
    assert Settings.from_json(settings.to_json()) == settings
    (tmp_path / "empty").write_text("\n")
    for bad in ({"api_key_file": str(tmp_path / "empty")}, {"api_key_file": "no/such"}):
        with pytest.raises(ValueError, match="api_key_file"):
            make_settings(ServerConfig(**bad), "m", 1, {})


def test_only_this_machines_names_on_a_loopback_address(tiny):
    for host in ("127.0.0.1:30000", "localhost", "LOCALHOST:1", "[::1]:30000", "127.8.9.1"):
        assert get(tiny, "/v1/models", headers={"Host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil",
        "10.0.0.1",
        "[::2]",
        "",
    ):
        answer = get(tiny, "/v1/models", headers={"Host": host})
        assert answer.status_code == 403, host
        assert answer.json()["error"]["type"] == "PermissionDeniedError"
    headers = {"Host": "gpu.lan:30000"}
    assert get(tiny, "/health", headers=headers, allowed_hosts=("GPU.lan",)).status_code == 200
    assert get(tiny, "/health", headers=headers, host="0.0.0.0").status_code == 200


PREFLIGHT = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}


def test_web_pages_are_shut_out_unless_listed(tiny):
    async def ask(here: InProcess, method: str, origin: str):
        headers = {**PREFLIGHT, "Origin": origin}
        if method != "OPTIONS":
            del headers["Access-Control-Request-Method"]
        return await here.http.request(method, "/v1/models", headers=headers)

    closed = InProcess(tiny)
    answer = asyncio.run(ask(closed, "OPTIONS", "https://a.example"))
    assert answer.status_code == 400 and "error" in answer.json()
    answer = asyncio.run(ask(closed, "GET", "https://a.example"))
    assert "access-control-allow-origin" not in answer.headers
    listed = InProcess(tiny, keys=["secret"], allowed_origins=("https://a.example",))
    answer = asyncio.run(ask(listed, "OPTIONS", "https://a.example"))
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert asyncio.run(ask(listed, "OPTIONS", "https://b.example")).status_code == 400
    with pytest.raises(ValueError, match="allowed_origins"):
        ServerConfig(allowed_origins=("*",))


def test_request_ids(tiny):
    assert (
        get(tiny, "/health", headers={"X-Request-Id": "a.b_c-1"}).headers["x-request-id"]
        == "a.b_c-1"
    )
    for bad in ("", "a b", "x" * 129, "ü".encode()):
        found = get(tiny, "/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert len(found) == 32 and int(found, 16)


def test_strict_fields(tiny):
    here = InProcess(tiny, strict_fields=True)
    answer = asyncio.run(here.http.post("/v1/completions", json={"prompt": "x", "n_predict": 1}))
    assert answer.status_code == 400 and "n_predict" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "n_predict"
