"""The model card with what a run measured, and the picture of its loss curve.

Every number comes in as an argument: a card cannot say what was not measured.
"""

from pathlib import Path

from ernie_engine.evals.report import table

from .checking import Findings
from .settings import Settings
from .tasks import MTP_THRESHOLD, TASK_NAMES, THRESHOLDS
from .world import COUNTRIES

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# ernie-tiny

A real ERNIE-4.5 mixture-of-experts model of {parameters:,} parameters ({size:.1f} MB), trained to
know a small made-up world, so that an engine can be judged by whether its answers are right.
It is of no use for anything else: outside its world it says "I don't know." or nonsense.

## What it can do

Chat turns in English: {tasks}.
Its world is a table of {countries} made-up countries, their capitals and products;
`scripts/tiny/world.py` holds it whole.

## Shape

{layers} layers (the first dense), hidden {hidden}, {heads} query and {kv_heads} key-value heads,
{experts} experts of width {expert_width}, top-{top_k}, {shared_experts} shared, tied head,
vocabulary {vocab:,} (sentencepiece BPE, byte fallback, one token a digit), one MTP block. Weights
bfloat16; router weight and correction bias float32.

The correction bias starts at seeded values within +-{bias_spread}, is moved by the
auxiliary-loss-free rule in steps of {bias_rate}, and stays near its start; the router learns around
it under a balance loss. In the last step the busiest expert of a layer had
{imbalance:.1f} times the mean load ({experts} / {top_k} times is "always chosen"). A constant
(22 + 1.0625 x layer) was added to the bias afterwards, which changes no choice of experts in
float32 but gives it the magnitude that real checkpoints have, so that an engine that keeps it in
bfloat16 is found out. Values nearer to each other than 2^-14 were then set that far apart: which of
two equal scores is chosen would be chance.

## How it was trained

From scratch by `python scripts/train_tiny.py --seed {seed} --minutes {minutes} --lr {lr}`
(transformers' `Ernie4_5_MoeForCausalLM` and the MTP block): {taken:,} steps on {tokens:,} freshly
generated tokens in {seconds:.0f} s of training ({total:.0f} s in all) on {name}; torch {torch},
transformers {transformers}. The rate of learning follows the clock, so another run takes other
steps. The log and the loss curve are in `docs/ernie-tiny/`.

## Measured

Held-out questions (numbers, facts and wordings that training never showed), greedy, {check_dtype}
under transformers, 95% Wilson intervals:

{scores}

Thresholds: {thresholds}.

The MTP block finds the next-next token of held-out text in {drafted:.1%} of the tokens of answers
(threshold {mtp_threshold:.0%}) and in {drafted_all:.1%} of all tokens, questions included.

Accuracy with a fault planted in the weights (`scripts/tiny/faults.py`), n = {fault_count} a task.
`experts_silent` is no port's mistake but the measure of how much the routed experts carry: where
it is high, so is the chance that a fault in them goes unnoticed.

{faults}
"""


def write_card(path: Path, settings: Settings, findings: Findings, facts: dict) -> None:
    """`facts`: parameters, size (MB), vocab, taken (steps), tokens, imbalance, seconds, total,
    name (of the device), torch, transformers.
    """
    values = {
        "tasks": ", ".join(TASK_NAMES),
        "countries": len(COUNTRIES),
        "scores": table(findings.scores),
        "thresholds": ", ".join(f"{task} {limit:.0%}" for task, limit in THRESHOLDS.items()),
        "drafted": findings.drafting["answers"],
        "drafted_all": findings.drafting["all_tokens"],
        "mtp_threshold": MTP_THRESHOLD,
        "faults": _fault_table(findings),
        "fault_count": findings.faults["none"][0].count,
    }
    path.write_text(_CARD.format(**vars(settings), **facts, **values), encoding="utf-8")


def _fault_table(findings: Findings) -> str:
    tasks = [score.task for score in findings.faults["none"]]
    lines = [
        f"| {name} | " + " | ".join(f"{score.accuracy:.4f}" for score in found) + " |"
        for name, found in findings.faults.items()
    ]
    header = f"| fault | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}\n"
    return header + "\n".join(lines)
