"""Which process this is among those of one engine, as torchrun (or the engine itself, for the
processes it starts) says in the environment.

Owns the names of those variables. Never talks to another process.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

_INTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """A process's rank among all and among those of its host; the one process by default.

    `is_launched`: somebody else has started all ranks (torchrun); else rank 0 starts the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    is_launched: bool = False

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "World":
        """ValueError if some of the variables are set, but not all, or to no sensible number."""
        names = (*_INTS, "MASTER_ADDR")
        missing = [name for name in names if not environ.get(name)]
        if "RANK" in missing or "WORLD_SIZE" in missing:
            return cls()  # MASTER_ADDR and the like may be left over from something else
        if missing:
            raise ValueError(
                f"RANK is set but not {', '.join(missing)}: start with torchrun, or unset RANK"
            )
        values = {name: _integer(name, environ[name]) for name in _INTS}
        world = cls(
            rank=values["RANK"],
            size=values["WORLD_SIZE"],
            local_rank=values["LOCAL_RANK"],
            local_size=values["LOCAL_WORLD_SIZE"],
            master_addr=environ["MASTER_ADDR"],
            master_port=values["MASTER_PORT"],
            is_launched=True,
        )
        if not (world.rank < world.size and world.local_rank < world.local_size <= world.size):
            raise ValueError(
                f"RANK, WORLD_SIZE and their LOCAL_ forms do not fit together: {values}"
            )
        return world

    @property
    def is_one_host(self) -> bool:
        return self.local_size == self.size


def host_name() -> str:
    return socket.gethostname()


def _integer(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} in the environment is not a number, 0 or more")
    return int(text)
