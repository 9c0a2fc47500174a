"""Where ranks meet."""

from pathlib import Path

from ernie_engine.parallel.connect import host_store


def listening(port: int) -> set[str]:
    """The addresses, as the kernel writes them, where somebody listens at a port."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        local.split(":")[0]
        for _, local, _, state, *_ in lines
        if state == "0A" and int(local.split(":")[1], 16) == port
    }


def test_the_store_of_a_plain_program_is_on_loopback_only():
    store = host_store(2, 5.0)
    assert listening(store.port) == {"0100007F"}
    store.set("key", "value")
    assert store.get("key") == b"value"
