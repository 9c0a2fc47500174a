"""Checkpoint -> parameters: streams a rank's parts into place and proves that nothing is missing,
left over or filled twice; or makes dummy weights.

Never allocates a parameter and never decides a cut: that is parallel/layers.py. Of a checkpoint's
data, no more than one part of one tensor is ever held.
"""

import logging
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, product

import torch
from torch import Tensor
from tqdm import tqdm

from ernie_engine.config import Shapes
from ernie_engine.model.checkpoint import ITEMSIZE, Checkpoint, Shard, StoredTensor, some
from ernie_engine.parallel.layers import WeightPart

log = logging.getLogger(__name__)

ROUTER = re.compile(r"\.mlp\.(gate\.weight|moe_statics\.e_score_correction_bias)$")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DUMMY = (  # end of a hub name -> (mean, std); the first that fits
    (("embed_tokens.weight",), (0.0, 1.0)),
    (("norm.weight",), (1.0, 0.0)),
    (("e_score_correction_bias",), (0.0, 0.0)),
    (("o_proj.weight", "down_proj.weight"), (0.0, 0.002)),
    (("_proj.weight", "mlp.gate.weight", "lm_head.weight"), (0.0, 0.02)),
)


def load_weights(
    parts: Iterable[WeightPart],
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    expected: Shapes | None = None,
    *,
    skip: tuple[str, ...] = ("model.mtp_",),
    progress: bool = True,
    on_part: Callable[[], None] = lambda: None,
) -> None:
    """Fill `parameters` through `parts`, which must cover each exactly once; converts dtypes.

    `expected`: the tensors of the whole model, where `parts` are a stage's. `on_part` is called
    after each part and may raise to give up. `skip` are prefixes of hub names to leave out.
    ValueError, before anything is read, listing what the checkpoint lacks, has too much or in
    another shape; ValueError also if a file cannot be read (but one cut short in the midst of a
    copy is a SIGBUS, as with every mapped file).
    An lm_head.weight beside a tied head is left out if it equals the embedding, else refused.
    """
    parts = list(parts)
    _assert_covered(parameters, parts)
    _check_names(expected or {part.name: part.shape for part in parts}, checkpoint, skip)
    order = {name: position for position, name in enumerate(checkpoint.tensors)}
    parts.sort(key=lambda part: order[part.name])
    plan = [(checkpoint.tensors[part.name], part) for part in parts]
    total = sum(part.dst.numel() * ITEMSIZE[stored.dtype] for stored, part in plan)
    filled = 0
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for file, group in groupby(plan, key=lambda pair: pair[0].file):
            shard = Shard(file)
            for stored, part in group:
                part.dst.copy_(shard.read(stored, part.index).reshape(part.dst.shape))
                filled += part.dst.numel()
                bar.update(part.dst.numel() * ITEMSIZE[stored.dtype])
                on_part()
    assert filled == sum(parameter.numel() for parameter in parameters.values())


def fill_dummy(
    parts: Iterable[WeightPart], seed: int = 0, on_part: Callable[[], None] = lambda: None
) -> None:
    """Random weights, drawn on the device, that keep the router balanced (load_format="dummy").

    Embedding std 1, other matrices 0.02 but those that write to the residual stream 0.002, norms
    1, router bias 0: the stream stays near the token's own embedding, so distinct tokens take
    distinct routes. A tensor is drawn whole and then cut, from (seed, name, shape, dtype) alone:
    on one kind of device every layout of ranks has the same model.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for part in parts:
        mean, std = _dummy_distribution(part.name)
        device = part.dst.device
        generator = generators.setdefault(device, torch.Generator(device))
        generator.manual_seed(zlib.crc32(f"{seed} {part.name}".encode()))
        whole = torch.empty(part.shape, dtype=part.dst.dtype, device=device)
        whole.normal_(mean, std, generator=generator)
        part.dst.copy_(whole[part.index].reshape(part.dst.shape))
        on_part()


def _dummy_distribution(name: str) -> tuple[float, float]:
    """(mean, std)"""
    found = next((values for ends, values in DUMMY if name.endswith(ends)), None)
    assert found is not None, f"no recipe for the tensor {name}"
    return found


def _check_names(wanted: Shapes, checkpoint: Checkpoint, skip: tuple[str, ...]) -> None:
    """Refuse a checkpoint that does not hold exactly what is wanted; log what is skipped."""
    found = checkpoint.shapes
    unused = [name for name in found if name not in wanted]
    skipped = [name for name in unused if name.startswith(skip)]
    spare_head = HEAD in unused and HEAD not in skipped and EMBEDDING in wanted
    allowed = {*skipped, HEAD} if spare_head else {*skipped}
    problems = {
        "missing": [f"{n} {shape}" for n, shape in wanted.items() if n not in found],
        "of another shape": [
            f"{n} (expected {shape}, found {found[n]})"
            for n, shape in wanted.items()
            if found.get(n, shape) != shape
        ],
        "unexpected": [f"{n} {found[n]}" for n in unused if n not in allowed],
    }
    lines = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(
            f"the tensors in {checkpoint.folder} are not what its config.json calls for, "
            f"use files that belong together: {'; '.join(lines)}"
        )
    rounded = [n for n, t in checkpoint.tensors.items() if ROUTER.search(n) and t.dtype != "F32"]
    if rounded:
        log.warning("routers are stored below fp32 and may choose other experts: %s", some(rounded))
    if spare_head:
        _check_spare_head(checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING])
    if skipped:
        log.info("%d tensors of the checkpoint are skipped: %s", len(skipped), some(skipped))


def _check_spare_head(head: StoredTensor, embedding: StoredTensor) -> None:
    """A head stored although it is tied must be a copy: transformers would use other values."""
    whole = (slice(None), slice(None))
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and torch.equal(
        Shard(head.file).read(head, whole), Shard(embedding.file).read(embedding, whole)
    )
    if not same:
        raise ValueError(
            f"{HEAD} in {head.file} differs from {EMBEDDING}, but config.json ties them: "
            "set tie_word_embeddings to false to use it, or remove it"
        )
    log.info("%s is skipped: it equals the embedding it is tied to", HEAD)


def _assert_covered(parameters: Mapping[str, Tensor], parts: list[WeightPart]) -> None:
    """The proof that the parts fill each element of each parameter once."""
    owners = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
    assert len(owners) == len(parameters), "parameters share memory"
    views: dict[str | None, list[Tensor]] = defaultdict(list)
    for part in parts:
        size = [len(range(*s.indices(n))) for s, n in zip(part.index, part.shape, strict=True)]
        assert size == list(part.dst.shape), f"{part.name}: a cut {size} for {part.dst.shape}"
        views[owners.get(part.dst.untyped_storage().data_ptr())].append(part.dst)
    assert None not in views, "a part lies in no parameter"
    for name, parameter in parameters.items():
        assert _tile(parameter, views[name]), f"the parts do not cover {name} exactly once"


def _tile(whole: Tensor, views: list[Tensor]) -> bool:
    """Whether views of the contiguous `whole` cover it without gap or overlap."""
    assert whole.is_contiguous()
    runs = [run for view in views for run in _runs(view)]
    begin, end = whole.storage_offset(), whole.storage_offset() + whole.numel()
    borders = sorted(runs)
    return [begin, *(stop for _, stop in borders)] == [*(start for start, _ in borders), end]


def _runs(view: Tensor) -> Iterator[tuple[int, int]]:
    """The (start, stop) of the unbroken stretches of a view, in elements of its storage."""
    length, offset = 1, int(view.storage_offset())
    dims = [(n, step) for n, step in zip(view.shape, view.stride(), strict=True) if n != 1]
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    for steps in product(*(range(0, n * step, step) for n, step in dims)):
        yield offset + sum(steps), offset + sum(steps) + length
