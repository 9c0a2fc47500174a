"""A whole run in order: tokenizer, data workers, training, checkpoint, check, and only then the
files.

Owns the order and the clock. A checkpoint that misses a threshold never reaches `--out`.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from . import checkpoint, tokenizer
from .card import write_card
from .checking import Findings, check
from .corpus import shards
from .model import TinyModel, make_config
from .probe import Probe
from .settings import Settings
from .training import Progress, batches, train


def make(settings: Settings) -> int:
    """Run everything; returns the exit status: 0 if the checkpoint was written."""
    started = time.perf_counter()
    device = _device(settings)
    torch.manual_seed(settings.seed)
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each of the check's many shapes
    pieces = tokenizer.train(settings.pieces, settings.seed)
    encoder = tokenizer.ChatEncoder(pieces)
    with shards(settings, pieces) as data:
        config = make_config(settings, encoder.vocab_size)
        dtype = getattr(torch, settings.dtype)
        model = TinyModel.fresh(config, settings.seed, dtype).to(device)
        print(f"{model.num_parameters():,} parameters, vocabulary {encoder.vocab_size}, {device}")
        probe = Probe(encoder, settings.probe_samples, seed=1, device=device)
        progress, lines = train(model, batches(data, settings, device), probe, settings, device)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.out.parent) as name:
        folder = Path(name) / settings.out.name
        folder.mkdir()
        checkpoint.write(model, pieces, folder)
        findings = check(folder, settings, device)
        total = time.perf_counter() - started
        facts = _facts(model, folder, progress, total, device)
        facts["imbalance"] = lines[-1]["imbalance"]
        write_card(folder / "README.md", settings, findings, facts)
        checkpoint.write_sums(folder)
        print(findings.text())
        is_written = settings.allow_miss or not findings.missed()
        if is_written:
            _replace(folder, settings.out)
    _record(settings, findings, facts, is_written)
    return 0 if is_written else 1


def _device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _facts(model: TinyModel, folder: Path, progress: Progress, total: float, device: str) -> dict:
    return {
        "parameters": model.num_parameters(),
        "size": (folder / checkpoint.WEIGHTS).stat().st_size / 1e6,
        "vocab": model.target.config.vocab_size,
        "taken": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.ended,
        "total": total,
        "name": torch.cuda.get_device_name() if device == "cuda" else "a CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _replace(folder: Path, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)


def _record(settings: Settings, findings: Findings, facts: dict, is_written: bool) -> None:
    """result.json and the curve beside the log; the result also as the last line of output."""
    picture = settings.docs / "loss.png"
    if find_spec("matplotlib"):
        command = [sys.executable, str(Path(__file__).with_name("curve.py"))]
        subprocess.run([*command, str(settings.docs / "log.jsonl"), str(picture)], check=True)
    else:
        print(f"matplotlib is not installed: {picture} is not drawn")
    result = {
        "written": str(settings.out) if is_written else None,
        **facts,
        "accuracy": {score.task: score.accuracy for score in findings.scores},
        "drafting": findings.drafting,
        "missed": findings.missed(),
    }
    whole = {
        **result,
        **dataclasses.asdict(findings),
        "settings": {name: str(value) for name, value in dataclasses.asdict(settings).items()},
    }
    (settings.docs / "result.json").write_text(json.dumps(whole, indent=1) + "\n")
    if not is_written:
        print(
            f"not written: below the threshold in {', '.join(findings.missed())}", file=sys.stderr
        )
    print(json.dumps(result))
