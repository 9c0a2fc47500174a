"""The control channel between threads of this process, and what strangers can do to it."""

import json
import logging
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from ernie_engine.framing import encode_json, framed
from ernie_engine.parallel import control
from ernie_engine.parallel import hub as hub_module
from ernie_engine.parallel import spoke as spoke_module
from ernie_engine.parallel.control import HELLO, PeerLost
from ernie_engine.parallel.health import State, Vitals
from ernie_engine.parallel.hub import Hub
from ernie_engine.parallel.spoke import Spoke
from ernie_engine.parallel.world import World

# A spoke's end is a SystemExit in the thread that finds it out.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
FACTS = {"max_model_len": 512, "torch": "2.13"}


class Store(dict):
    """As much of torch's store as is used."""

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        while key not in self:
            time.sleep(0.01)
        return self[key]


class NoGuard:
    """Or it would end this process when a test breaks a watch."""

    def __init__(self, timeout_seconds):
        pass

    def beat(self):
        pass

    close = beat


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    for module in (hub_module, spoke_module):
        monkeypatch.setattr(module, "Guard", NoGuard)


class QuietSpoke(Spoke):
    """Whose end is noted instead of ending this process."""

    died = None

    def _die(self, reason):
        self.died = reason
        self._is_stopping.set()
        self._plans.put(None)
        raise SystemExit


def world(rank: int, size: int = 3) -> World:
    return World(rank, size, rank, size)


class Net:
    """A hub and two spokes; their vitals can be changed."""

    def __init__(self, timeout: float = 10.0):
        self.vitals = [Vitals(State.IDLE)] * 3
        self.store, self.failures = Store(), []
        self.hub = Hub(world(0), self.store, timeout, None, lambda: self.vitals[0])
        self.hub.on_failure = self.failures.append
        self.spokes = {}
        joiners = [threading.Thread(target=self.join, args=(r, timeout)) for r in (1, 2)]
        for joiner in joiners:
            joiner.start()
        self.hub.wait_for_all(FACTS, 10.0)
        for joiner in joiners:
            joiner.join()

    def join(self, rank: int, timeout: float) -> None:
        self.spokes[rank] = QuietSpoke(
            world(rank), self.store, timeout, FACTS, lambda: self.vitals[rank]
        )

    def close(self) -> None:
        stopper = threading.Thread(target=self.hub.stop)
        stopper.start()
        leavers = [threading.Thread(target=leave, args=(s,)) for s in self.spokes.values()]
        for leaver in leavers:
            leaver.start()
        for leaver in leavers:
            leaver.join(10)
        stopper.join(10)
        assert not stopper.is_alive()

    def wait(self, is_so, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def leave(spoke: QuietSpoke) -> None:
    if spoke.died is None:
        assert spoke.next_plan() is None
        spoke.leave()
        spoke.close()


@pytest.fixture
def net():
    net = Net()
    yield net
    net.close()


def test_plans_go_down_in_order_and_results_come_up(net):
    plans = [b"plan" + bytes([i]) * size for i, size in enumerate((1, 5_000_000, 20))]
    for plan in plans:
        net.hub.send_plan(plan)
    for spoke in net.spokes.values():
        assert [spoke.next_plan() for _ in plans] == plans
    for i in range(3):
        net.spokes[2].send_result(b"done" + bytes([i]))
    assert [net.hub.result() for _ in range(3)] == [b"done" + bytes([i]) for i in range(3)]


def test_the_fewest_blocks_that_any_rank_has_are_agreed_on(net):
    found = {}

    def agree(rank: int, fits: int) -> None:
        found[rank] = net.spokes[rank].agree(fits)

    threads = [threading.Thread(target=agree, args=pair) for pair in ((1, 70), (2, 50))]
    for thread in threads:
        thread.start()
    found[0] = net.hub.agree(60)
    for thread in threads:
        thread.join()
    assert found == {0: 50, 1: 50, 2: 50}


def test_vitals_of_all_ranks_are_known(net):
    net.vitals[1] = Vitals(State.STEPPING, 0, 7, 6, 5, 1.5)
    net.wait(lambda: net.hub.vitals()[1] == net.vitals[1])
    assert net.hub.vitals()[0] == net.vitals[0]


def test_a_plan_is_sent_within_a_tenth_of_a_millisecond_a_rank(net):
    """To a reader that answers each: there and back, so twice the way."""
    plan, took = b"plan" + bytes(2000), []

    def echo() -> None:
        while (frame := net.spokes[1].next_plan()) is not None and len(frame) > 10:
            net.spokes[1].send_result(b"done")

    thread = threading.Thread(target=echo)
    thread.start()
    for _ in range(300):
        began = time.perf_counter()
        net.hub.send_plan(plan)
        net.hub.result()
        took.append(time.perf_counter() - began)
    net.hub.send_plan(b"plan")
    thread.join()
    while net.spokes[2].next_plan() != b"plan":
        pass
    assert sorted(took)[len(took) // 2] < 2 * 400e-6  # generous: the machine is shared


def test_a_rank_that_ends_without_a_word_is_to_blame_not_the_one_that_noticed(net):
    net.vitals[2] = Vitals(State.STEPPING, 0, 1)
    net.wait(lambda: net.hub.vitals()[2].state is State.STEPPING)
    told = encode_json(control.FAIL, {"reason": "connection closed", "is_user_error": False})
    net.spokes[1]._line.send(told)
    net.spokes[2]._is_stopping.set()  # this thread's life goes on
    net.spokes[2]._line.close()
    with pytest.raises(PeerLost, match=r"rank 2 \(.*, pid \d+\) has ended .*it was stepping"):
        net.hub.result()
    net.wait(lambda: net.failures and net.spokes[1].died)
    assert "rank 2" in str(net.failures[0]) and "rank 2" in net.spokes[1].died
    net.spokes[2].died = "by this test"
    with pytest.raises(PeerLost):
        net.hub.check()
    with pytest.raises(PeerLost):
        net.hub.result()  # whoever asks


def test_what_rank_0_notices_is_explained_by_who_died(net):
    net.spokes[1]._is_stopping.set()
    net.spokes[1]._line.close()
    cause = net.hub.explain(RuntimeError("gloo: connection closed"))
    assert isinstance(cause, PeerLost) and "rank 1" in str(cause)
    net.spokes[1].died = "by this test"
    net.wait(lambda: net.spokes[2].died is not None)


def test_a_users_mistake_on_another_rank_is_a_value_error(net):
    told = {"reason": "max_model_len=9 is too much", "is_user_error": True}
    net.spokes[1]._line.send(encode_json(control.FAIL, told))
    with pytest.raises(ValueError, match=r"rank 1 \(.*\): max_model_len=9 is too much"):
        net.hub.result()
    net.wait(lambda: all(spoke.died for spoke in net.spokes.values()))


def test_a_hang_ends_everybody_within_the_time_out():
    net = Net(timeout=2.5)
    net.vitals[1] = Vitals(State.STEPPING, 0, 4, 3, 10)
    with pytest.raises(PeerLost, match=r"rank 1 .* hangs: a step has made no progress"):
        net.hub.result()
    net.wait(lambda: all(spoke.died for spoke in net.spokes.values()))
    net.close()


def test_a_rank_that_does_not_read_is_named_in_time_and_holds_nobody_up(monkeypatch):
    """A plan is larger than what the kernel keeps for it; the guard must hear of us meanwhile."""
    beats = []
    monkeypatch.setattr(NoGuard, "beat", lambda self: beats.append(time.monotonic()))
    net = Net(timeout=4.0)
    net.spokes[1]._is_stopping.set()  # neither speaks
    net.spokes[1]._line.read = lambda: time.sleep(60)  # nor reads
    net.hub.send_plan(b"plan")
    began = time.monotonic()
    net.hub.send_plan(b"plan" + bytes(60 << 20))
    with pytest.raises(PeerLost, match=r"rank 1 \("):
        net.hub.result()
    net.wait(lambda: bool(net.failures))
    assert time.monotonic() - began < 4.0
    assert time.monotonic() - beats[-1] < 4.0


def test_when_rank_0_goes_it_is_named_with_its_host(net):
    for rank, peer in net.hub._peers.items():
        net.spokes[rank]._line.send(encode_json(control.BYE, Vitals().to_json()))
        peer.reader.join(5)
    net.hub._is_stopping = True
    for peer in net.hub._peers.values():
        peer.line.close()
    net.wait(lambda: all(spoke.died for spoke in net.spokes.values()))
    assert re.fullmatch(r"rank 0 \(.+\) has ended or cannot be reached", net.spokes[1].died)
    net.hub._is_stopping = False


def test_a_silent_rank_0_is_noticed():
    net = Net(timeout=2.5)
    net.hub._is_stopping = True
    net.hub._trouble.set()  # its watch ends without a word
    net.wait(lambda: all(spoke.died for spoke in net.spokes.values()))
    assert "rank 0" in net.spokes[1].died and "not been heard of" in net.spokes[1].died
    net.close()


def hello(store: Store, **changes) -> dict:
    told = {"rank": 1, "host": "h", "pid": 1, "facts": FACTS}
    token = json.loads(store.get("control"))["token"]
    return {**told, "token": token, **changes}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"",
        framed(b"helo not json"),
        framed(b"helo" + b"[" * 60_000),
        framed(encode_json(HELLO, {"rank": 1})),
        framed(encode_json(HELLO, {"rank": [], "token": "x", "host": "", "pid": 1, "facts": {}})),
    ],
    ids=lambda data: str(data[:20]),
)
def test_strangers_are_turned_away_and_ranks_still_come(data, caplog, monkeypatch):
    monkeypatch.setattr(hub_module, "HELLO_SECONDS", 0.3)
    store = Store()
    hub = Hub(world(0, 2), store, 10.0, None, Vitals)
    address = json.loads(store.get("control"))
    waiter = threading.Thread(target=hub.wait_for_all, args=(FACTS, 10.0))
    waiter.start()
    with caplog.at_level(logging.WARNING):
        with socket.create_connection((address["host"], address["port"])) as stranger:
            stranger.sendall(data)
            stranger.settimeout(5)
            assert stranger.recv(10) == b""
        wrong = framed(encode_json(HELLO, hello(store, token="guess")))
        with socket.create_connection((address["host"], address["port"])) as stranger:
            stranger.sendall(wrong)
            assert stranger.recv(10) == b""
    spoke = QuietSpoke(world(1, 2), store, 10.0, FACTS, Vitals)
    waiter.join(10)
    assert not waiter.is_alive()
    stopper = threading.Thread(target=hub.stop)
    stopper.start()
    leave(spoke)
    stopper.join(10)


def test_a_stranger_who_drips_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(hub_module, "HELLO_SECONDS", 0.4)
    store = Store()
    hub = Hub(world(0, 2), store, 10.0, None, Vitals)
    address = json.loads(store.get("control"))

    def drip() -> None:
        with socket.create_connection((address["host"], address["port"])) as stranger:
            for byte in framed(b"helo" + b" " * 1000):
                try:
                    stranger.sendall(bytes([byte]))
                except OSError:
                    return
                time.sleep(0.1)

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(PeerLost, match="did not join within 1 s"):
        hub.wait_for_all(FACTS, 1.0)
    dripping.join(5)
    assert not dripping.is_alive()
    hub.stop()


def test_ranks_started_differently_are_refused_with_the_difference():
    store, refused = Store(), []
    hub = Hub(world(0, 2), store, 10.0, None, Vitals)

    def join() -> None:
        try:
            QuietSpoke(world(1, 2), store, 10.0, {**FACTS, "max_model_len": 256}, Vitals)
        except PeerLost as error:
            refused.append(str(error))

    joiner = threading.Thread(target=join)
    joiner.start()
    with pytest.raises(ValueError, match=r"rank 1 .* max_model_len=256, rank 0 with 512") as caught:
        hub.wait_for_all(FACTS, 10.0)
    hub.explain(caught.value)
    joiner.join(10)
    assert "max_model_len=256" in refused[0]
    hub.stop()


def test_who_came_first_hears_of_rank_0_while_it_waits_for_the_others():
    """However long the last one takes; and who is lost meanwhile is named at once."""
    store, spokes = Store(), {}
    hub = Hub(world(0), store, 1.5, None, Vitals)

    def join(rank: int, seconds: float) -> None:
        time.sleep(seconds)
        spokes[rank] = QuietSpoke(world(rank), store, 1.5, FACTS, Vitals)

    joiners = [threading.Thread(target=join, args=pair) for pair in ((1, 0.0), (2, 2.5))]
    for joiner in joiners:
        joiner.start()
    hub.wait_for_all(FACTS, 10.0)
    for joiner in joiners:
        joiner.join()
    time.sleep(1.0)
    assert hub.failure is None and not any(spoke.died for spoke in spokes.values())
    stopper = threading.Thread(target=hub.stop)
    stopper.start()
    for spoke in spokes.values():
        leave(spoke)
    stopper.join(10)

    hub = Hub(world(0), (store := Store()), 10.0, None, Vitals)
    threading.Thread(target=lambda: join_and_go(store)).start()
    with pytest.raises(PeerLost, match=r"rank 1 \(.*, pid \d+\) has ended"):
        hub.wait_for_all(FACTS, 10.0)
    hub.stop()


def join_and_go(store: Store) -> None:
    spoke = QuietSpoke(world(1), store, 10.0, FACTS, Vitals)
    spoke._is_stopping.set()
    spoke._line.close()


def test_ranks_that_do_not_come_are_named():
    hub = Hub(world(0), Store(), 10.0, None, Vitals)
    with pytest.raises(PeerLost, match=r"ranks \[1, 2\] did not join within 0.5 s"):
        hub.wait_for_all(FACTS, 0.5)
    hub.stop()
    ends = {1: "ended with status 3", 2: None}
    hub = Hub(world(0), Store(), 10.0, None, Vitals, ends.get)
    with pytest.raises(PeerLost, match="rank 1 ended with status 3 before it joined"):
        hub.wait_for_all(FACTS, 5.0)
    hub.stop()


def test_a_rank_that_will_not_come_says_why():
    store = Store()
    hub = Hub(world(0), store, 10.0, None, Vitals)
    control.refuse(store, 2, "b: model='/m' is not a folder")
    with pytest.raises(ValueError, match="rank 2: b: model='/m' is not a folder"):
        hub.wait_for_all(FACTS, 5.0)
    hub.stop()


def test_a_name_that_means_loopback_here_is_listened_for_everywhere(monkeypatch):
    """As Debian has it for a host's own name: other hosts know another address by it."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    store = Store()
    hub = Hub(replace(world(0), local_size=1, master_addr="head"), store, 10.0, None, Vitals)
    assert hub._listener.getsockname()[0] == "0.0.0.0"
    assert json.loads(store.get("control"))["host"] == "head"
    hub.stop()
    for name in ("localhost", "127.0.0.1"):  # two agents on one host
        hub = Hub(replace(world(0), local_size=1, master_addr=name), Store(), 10.0, None, Vitals)
        assert hub._listener.getsockname()[0] == "127.0.0.1"
        hub.stop()


def test_a_port_that_is_taken_or_an_address_of_another_host_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"control_port={port}"):
            Hub(world(0), Store(), 10.0, port, Vitals)
    far = replace(world(0), local_size=1, master_addr="192.0.2.1")
    with pytest.raises(ValueError, match=r"listen at 192.0.2.1.*--master-addr"):
        Hub(far, Store(), 10.0, None, Vitals)


GUARDED = """
    import os, signal, sys, time
    from ernie_engine.parallel.guard import Guard
    guard = Guard(1.0)
    print("ready", flush=True)
    for _ in range(8):
        guard.beat()
        time.sleep(0.1)
    if sys.argv[1] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    guard.close()
"""


@pytest.mark.parametrize(("how", "status"), [("stop", -9), ("end", 0)])
def test_a_stopped_process_is_ended_by_its_guard_and_a_live_one_is_not(how, status):
    command = [sys.executable, "-c", textwrap.dedent(GUARDED), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == status
    assert ("has not moved for 1 s: killed" in done.stderr) == (how == "stop")
