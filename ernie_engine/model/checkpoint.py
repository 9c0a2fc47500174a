"""A checkpoint folder's safetensors files, as one table of tensors under the hub's names.

Owns which files belong together, their headers and the names of transformers' dumps. Files are
mapped: of their data, no more than what is asked for is read. Never unpickles, knows no parameter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ernie_engine.config import Shapes, read_json

INDEX = "model.safetensors.index.json"
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of an element, by accepted dtype
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
# The names of transformers' modules, which a dumped state_dict has.
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj")
BIAS = re.compile(r"(.*\.mlp)\.(?:gate\.)?(moe_statics\.e_score_correction_bias)")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the hub has it: rows [row, row + shape[0]) of what is stored, at `lead`."""

    file: Path
    name: str  # in the file
    dtype: str  # in safetensors' words: BF16, F32, ...
    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()  # the expert, in a fused tensor
    row: int = 0
    flat: bool = False  # stored without the leading 1 of `shape`

    def locate(self, index: tuple[slice, ...]) -> tuple[int | slice, ...]:
        """`index` into `shape`, as an index into what is stored."""
        first, *rest = (slice(*s.indices(n)) for s, n in zip(index, self.shape, strict=True))
        rows = slice(first.start + self.row, first.stop + self.row)
        return tuple(rest) if self.flat else (*self.lead, rows, *rest)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by hub name, in stored order."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of the index's shards, or of the only set of files there is.

        ValueError, naming file and tensor, if one is broken, missing, double or not of floats.
        """
        folder = Path(folder)
        shards = _indexed_shards(folder) if (folder / INDEX).exists() else _lone_shards(folder)
        tensors: dict[str, StoredTensor] = {}
        for file, expected in shards.items():
            for name, stored in _read_header(file, expected):
                if name in tensors:
                    raise ValueError(f"{name} is in {tensors[name].file} and {file}: remove one")
                tensors[name] = stored
        return cls(folder, tensors)

    @property
    def shapes(self) -> Shapes:
        return {name: stored.shape for name, stored in self.tensors.items()}


class Shard:
    """A mapped safetensors file; errors name it."""

    def __init__(self, file: Path):
        try:
            self.data, self.size = safe_open(file, framework="pt"), file.stat().st_size
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot open {file} ({error}): download it again") from error

    def read(self, stored: StoredTensor, index: tuple[slice, ...]) -> Tensor:
        """A view of the mapped file where it can be one."""
        try:
            if stored.file.stat().st_size != self.size:
                raise OSError("the file changed while it was read")
            return self.data.get_slice(stored.name)[stored.locate(index)]
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"cannot read {stored.name} in {stored.file} ({error}): download it again"
            ) from error


def _indexed_shards(folder: Path) -> Mapping[Path, set[str] | None]:
    """Shard -> the names that the index places there."""
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: download it again")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[^/\\]+\.safetensors", shard)
        if not plain:
            raise ValueError(f"{index} puts {name} in {shard!r}: not a *.safetensors beside it")
        shards.setdefault(folder / shard, set()).add(name)
    single = folder / "model.safetensors"
    if single.exists() and single not in shards:
        raise ValueError(f"{folder} has both {INDEX} and {single.name}: remove the one not meant")
    return shards


def _lone_shards(folder: Path) -> Mapping[Path, set[str] | None]:
    """model.safetensors, else the one complete set of numbered shards, else the only file."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{folder} has no *.safetensors file: no other format is read")
    expected = ["model.safetensors"] if "model.safetensors" in names else names[:1]
    if match := SHARD.fullmatch(expected[0]):
        base, count = match.groups()
        expected = [f"{base}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))]
        if missing := sorted(set(expected) - set(names)):
            raise ValueError(f"{folder} lacks {some(missing)}: download the rest")
    if names != expected and expected != ["model.safetensors"]:
        raise ValueError(f"{folder} has no {INDEX} to tell which of {some(names)} belong together")
    return dict.fromkeys([folder / name for name in expected])


def _read_header(file: Path, expected: set[str] | None) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file under hub names, in stored order."""
    shard = Shard(file)
    names: list[str] = shard.data.offset_keys()
    if expected is not None and (lacking := sorted(expected.difference(names))):
        raise ValueError(
            f"{file} lacks {some(lacking)}, which {INDEX} puts there: download both again"
        )
    if expected is not None and (strays := sorted(set(names) - expected)):
        raise ValueError(f"{file} holds {some(strays)}, which {INDEX} does not put there")
    for name in names:
        header = shard.data.get_slice(name)
        dtype, shape = header.get_dtype(), tuple(header.get_shape())
        if dtype not in ITEMSIZE:
            raise ValueError(
                f"{name} in {file} is {dtype}: quantized checkpoints are not supported, "
                f"only {', '.join(ITEMSIZE)}"
            )
        yield from _hub_names(StoredTensor(file, name, dtype, shape))


def _hub_names(stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """What is stored under one name, as the tensors that the hub has in its place."""
    shape = stored.shape
    match = FUSED.fullmatch(stored.name)
    halves = match[2].split("_") if match else []
    if match and len(shape) == 3 and shape[1] % len(halves) == 0:
        rows = shape[1] // len(halves)
        for expert in range(shape[0]):
            for i, half in enumerate(halves):
                view = replace(stored, shape=(rows, shape[2]), lead=(expert,), row=i * rows)
                yield f"{match[1]}.{expert}.{half}_proj.weight", view
    elif match := BIAS.fullmatch(stored.name):
        flat = len(shape) == 1
        yield (
            f"{match[1]}.{match[2]}",
            replace(stored, shape=(1, *shape) if flat else shape, flat=flat),
        )
    else:
        yield stored.name, stored


def some(names: Sequence[str], limit: int = 8) -> str:
    """A few of many names, for an error message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
