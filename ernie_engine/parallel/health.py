"""Is every rank alive and getting on? What ranks say of themselves, and what follows from it.

Owns the states and the two rules (silence, no progress). No clock, no socket, no thread: times
come by argument.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

INTERVAL_SECONDS = 0.5  # between two words of a rank, and between two looks at them
_SILENCE = 0.8  # of the time-out: so that a lost rank is named within it


class State(StrEnum):
    LOADING = "loading"
    COMPILING = "compiling"
    STEPPING = "stepping"
    IDLE = "idle"


@dataclass(frozen=True)
class Vitals:
    """What a rank says of itself, twice a second. `pulse` counts what it has begun within steps:
    layers, collectives, transfers; it compares ranks of one `stage` only."""

    state: State = State.LOADING
    stage: int = 0
    steps_begun: int = 0
    steps_done: int = 0
    pulse: int = 0
    busy_seconds: float = 0.0
    peak_memory: int = 0  # bytes of GPU memory that tensors took at most
    num_compilations: int = 0  # kernels that it has taken up

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Vitals":
        values = {**data, "state": State(data["state"])}
        return cls(**values)

    @property
    def progress(self) -> tuple[State, int, int, int]:
        return self.state, self.steps_begun, self.steps_done, self.pulse

    @property
    def place(self) -> tuple[int, int, int]:
        """Of stuck ranks the one with the least holds the others up: all wait for an earlier step,
        in a step each stage waits for the one before it, and in a stage all for each other."""
        return self.steps_done, self.stage, self.pulse


@dataclass
class _Record:
    vitals: Vitals
    heard_at: float
    moved_at: float


class Watch:
    """Hears of ranks and says which one is lost. `names`: rank -> how to call it."""

    def __init__(self, names: Mapping[int, str], timeout_seconds: float, now: float):
        self._names, self._timeout = dict(names), timeout_seconds
        self._records = {rank: _Record(Vitals(), now, now) for rank in names}
        self._looked_at = now

    def meet(self, rank: int, name: str, now: float) -> None:
        """From now on this one is watched too."""
        self._names[rank] = name
        self._records[rank] = _Record(Vitals(), now, now)

    def hear(self, rank: int, vitals: Vitals, now: float) -> None:
        record = self._records[rank]
        if vitals.progress != record.vitals.progress:
            record.moved_at = now
        record.vitals, record.heard_at = vitals, now

    def vitals(self, rank: int) -> Vitals:
        return self._records[rank].vitals

    def look(self, now: float, hangs: bool = True) -> str | None:
        """Who is lost and why; None if nobody is. Without `hangs` only silence counts."""
        self._forgive_own_pause(now)
        for rank, record in list(self._records.items()):  # one may come meanwhile
            silent = now - record.heard_at
            if silent > _SILENCE * self._timeout:
                return (
                    f"{self._names[rank]} has not been heard of for {silent:.0f} s; "
                    f"it was {record.vitals.state}"
                )
        return self._hang(now) if hangs else None

    def _hang(self, now: float) -> str | None:
        """Those who stopped at about the same time count together, whoever was heard of first."""
        stuck = [
            (record.vitals.place, self._names[rank], now - record.moved_at, record.vitals)
            for rank, record in list(self._records.items())
            if record.vitals.state is State.STEPPING
            and now - record.moved_at > self._timeout - 2 * INTERVAL_SECONDS
        ]
        if not any(seconds > self._timeout for _, _, seconds, _ in stuck):
            return None
        stuck.sort(key=lambda entry: entry[0])
        culprit, seconds = stuck[0][1], max(entry[2] for entry in stuck)
        every = "; ".join(
            f"{name}: stage {vitals.stage}, {vitals.steps_begun} steps begun, "
            f"{vitals.steps_done} done, pulse {vitals.pulse}"
            for _, name, _, vitals in stuck
        )
        return f"{culprit} hangs: a step has made no progress for {seconds:.0f} s ({every})"

    def _forgive_own_pause(self, now: float) -> None:
        """If this process itself was stopped for a while, nobody was silent meanwhile."""
        pause = now - self._looked_at - INTERVAL_SECONDS
        self._looked_at = now
        if pause > 2 * INTERVAL_SECONDS:
            for record in self._records.values():
                record.heard_at += pause
                record.moved_at += pause
