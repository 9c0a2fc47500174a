"""Compare the engine with transformers on a checkpoint: log-probabilities and greedy tokens.

python scripts/check_parity.py --model DIR

In float32 both must agree: the same greedy tokens, log-probabilities within --tolerance. In
bfloat16 and float16 the two round differently; each is compared with transformers in float32, and
the engine's root-mean-square error may be at most 1.2 x transformers' own. Exits 1 on disagreement.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from ernie_engine import Engine, RequestOutput, SamplingParams
from ernie_engine.cli import add_engine_arguments, engine_fields

ALLOWED_RATIO = 1.2


@dataclass(frozen=True)
class Row:
    """One prompt: how far the greedy tokens agree, and errors of log-probabilities."""

    num_prompt: int
    num_tokens: int
    num_equal: int
    worst: float  # |engine - transformers| in the engine's dtype
    engine_square: float  # sum over tokens of (engine - transformers in float32)^2
    transformers_square: float


class Reference:
    """transformers in one dtype on the engine's device."""

    def __init__(self, folder: str, dtype: str, device: str):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model, self.device = model.to(device).eval(), device
        model.generation_config.eos_token_id = None  # answers of equal length

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=self.device)
        seen = torch.ones_like(ids)  # or generate() would take token 0 for padding
        out = self.model.generate(
            ids, attention_mask=seen, max_new_tokens=num_tokens, do_sample=False
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Of each token after the first, given those before it: [T - 1] fp32."""
        ids = torch.tensor([tokens], device=self.device)
        scores = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return scores.gather(1, ids[0, 1:, None])[:, 0].cpu()


def main() -> int:
    args = _parser().parse_args()
    try:
        rows, dtype = compare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if _report(rows, dtype, args.tolerance) else 1


def compare(args: argparse.Namespace) -> tuple[list[Row], str]:
    """Run the engine, then transformers, over random prompts of several lengths."""
    params = SamplingParams(
        max_tokens=args.num_tokens, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    with Engine(**engine_fields(args)) as engine:
        dtype, device = engine.config.dtype, engine.config.device
        generator = torch.Generator().manual_seed(args.seed)
        most = engine.config.max_model_len - args.num_tokens - 1
        lengths = [min(length, most) for length in args.lengths]
        vocab_size = engine.model_config.vocab_size
        prompts = [
            torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths
        ]
        outputs = engine.generate(prompts, params)
    same = Reference(args.model, dtype, device)
    exact = same if dtype == "float32" else Reference(args.model, "float32", device)
    return [_row(output, same, exact) for output in tqdm(outputs, desc="transformers")], dtype


def _row(output: RequestOutput, same: Reference, exact: Reference) -> Row:
    prompt, answer = output.prompt_token_ids, output.outputs[0]
    expected = same.greedy(prompt, len(answer.token_ids))
    differs = [a != b for a, b in zip(answer.token_ids, expected, strict=True)]
    tokens = prompt + answer.token_ids
    assert output.prompt_logprobs is not None and answer.logprobs is not None
    scores = [*output.prompt_logprobs[1:], *answer.logprobs]
    ours = torch.tensor([s[t].logprob for s, t in zip(scores, tokens[1:], strict=True) if s])
    theirs, true = same.logprobs(tokens), exact.logprobs(tokens)
    return Row(
        num_prompt=len(prompt),
        num_tokens=len(expected),
        num_equal=differs.index(True) if any(differs) else len(differs),
        worst=(ours - theirs).abs().max().item(),
        engine_square=(ours - true).square().sum().item(),
        transformers_square=(theirs - true).square().sum().item(),
    )


def _report(rows: list[Row], dtype: str, tolerance: float) -> bool:
    print(f"{'prompt':>8} {'greedy tokens equal':>20} {'max |log-prob. error|':>22}")
    for row in rows:
        equal = f"{row.num_equal} of {row.num_tokens}"
        print(f"{row.num_prompt:>8} {equal:>20} {row.worst:>22.2e}")
    count = sum(row.num_prompt + row.num_tokens - 1 for row in rows)
    if dtype == "float32":
        tokens_equal = all(row.num_equal == row.num_tokens for row in rows)
        agrees = tokens_equal and all(row.worst <= tolerance for row in rows)  # NaN never is
        rule = f"equal tokens, errors within {tolerance:g}"
    else:
        ours = (sum(row.engine_square for row in rows) / count) ** 0.5
        theirs = (sum(row.transformers_square for row in rows) / count) ** 0.5
        print(
            f"error against float32, root mean square: {ours:.2e}; transformers' own {theirs:.2e}"
        )
        agrees = ours <= ALLOWED_RATIO * theirs
        rule = f"at most {ALLOWED_RATIO} x transformers' own error"
    verdict = "agrees" if agrees else "DISAGREES"
    print(f"{dtype}: engine {verdict} with transformers over {count} tokens ({rule})")
    return agrees


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-tokens", type=int, default=64, help="greedy tokens a prompt")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 7, 16, 100, 333, 900])
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    add_engine_arguments(parser)
    parser.set_defaults(dtype="float32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
