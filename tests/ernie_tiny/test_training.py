"""Model, batches and the loop: what is trained is what transformers runs."""

import itertools
import json
import time
from dataclasses import replace

import pytest
import torch
from tiny.batch import Batch, class_weights, weighted_loss
from tiny.corpus import FIRST_TASK, PAD, Rows, encode
from tiny.model import EVERY_EXPERT, RouterBalance, TinyModel, is_router, make_config
from tiny.optimizer import MasterOptimizer, orthogonal
from tiny.probe import Probe
from tiny.settings import MAX_PARAMETERS, Settings, parse
from tiny.tasks import TASK_NAMES, held_out
from tiny.tokenizer import ChatEncoder
from tiny.training import Progress

SMOKE = parse(["--smoke"])


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyModel:
    return TinyModel.fresh(make_config(SMOKE, 2048), seed, dtype)


def make_batch(encoder: ChatEncoder, length: int = 160) -> Batch:
    """Two rows: three conversations, and one; both padded."""
    documents = [encode(encoder, held_out(t, 1)[0]) for t in ("world", "arithmetic", "spelling")]
    rows = Rows(2, length)
    start = 0
    for number, document in enumerate(documents, 1):
        rows.put(0, start, number, *document)
        start += len(document[0])
    rows.put(1, 0, 1, *documents[0])
    return Batch.from_arrays(vars(rows), "cpu")


def test_the_full_model_fits():
    config = make_config(Settings(), 2048)
    parameters = TinyModel.fresh(config, 0, torch.bfloat16).num_parameters()
    assert 6_500_000 < parameters <= MAX_PARAMETERS


def test_fresh_weights_follow_the_seed_and_routers_stay_float32():
    a, b, c = make_model(0, torch.bfloat16), make_model(0, torch.bfloat16), make_model(1)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
        assert x.dtype == (torch.float32 if is_router(name) else torch.bfloat16)
    assert not torch.equal(c.target.lm_head.weight, a.target.lm_head.weight.float())
    assert a.target.model.rotary_emb.inv_freq.dtype == torch.float32


def test_training_form_of_the_experts_equals_transformers(encoder: ChatEncoder):
    model, batch = make_model(), make_batch(encoder)
    inputs = (batch.tokens, batch.positions(), batch.mask(torch.float32))
    outputs, gradients = [], []
    for implementation in (EVERY_EXPERT, "eager"):
        model.target.config._experts_implementation = implementation
        logits, drafts = model(*inputs)
        model.zero_grad()
        (logits.square().mean() + drafts.square().mean()).backward()
        outputs.append(logits.detach())
        layer = model.target.model.layers[1].mlp
        gradients.append([p.grad.clone() for p in (layer.experts.down_proj, layer.gate.weight)])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_packed_conversation_computes_what_it_would_alone(encoder: ChatEncoder):
    model, batch = make_model(), make_batch(encoder)
    with torch.no_grad():
        packed = model(batch.tokens, batch.positions(), batch.mask(torch.float32))
        for number in (1, 2, 3):
            (places,) = torch.where(batch.documents[0] == number)
            tokens = batch.tokens[:1, places]
            alone = Batch(tokens, tokens, torch.ones_like(tokens))
            logits, drafts = model(tokens, alone.positions(), alone.mask(torch.float32))
            torch.testing.assert_close(packed[0][:1, places], logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                packed[1][:1, places[:-1]], drafts[:, :-1], rtol=1e-4, atol=1e-5
            )
            theirs = model.target(tokens).logits
            torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-5)


def test_no_token_is_predicted_across_conversations(encoder: ChatEncoder):
    batch = make_batch(encoder)
    for distance in (1, 2):
        tokens, classes = batch.ahead(distance)
        for row, place in itertools.product(range(2), range(160)):
            later = place + distance
            same = later < 160 and batch.documents[row, place] == batch.documents[row, later]
            if same and batch.documents[row, place]:
                assert tokens[row, place] == batch.tokens[row, later]
                assert classes[row, place] == batch.classes[row, later] != PAD
            else:
                assert classes[row, place] == PAD


def test_loss_weighs_answers_and_ignores_padding(encoder: ChatEncoder):
    batch = make_batch(encoder)
    target, classes = batch.ahead(1)
    logits = torch.randn(*target.shape, 2048, generator=torch.Generator().manual_seed(0))
    loss, sums = weighted_loss(logits, target, classes, class_weights(0.0, "cpu"))
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    )
    answers = (classes >= FIRST_TASK).flatten()
    torch.testing.assert_close(loss, each[answers].mean())
    world = FIRST_TASK + TASK_NAMES.index("world")
    assert sums[1, world] == (classes == world).sum()
    torch.testing.assert_close(sums[0, world], each[(classes == world).flatten()].sum())


def random_batch() -> Batch:
    tokens = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens, torch.ones_like(tokens))


def test_the_rule_evens_out_the_load():
    model = make_model().train()
    for router in model.routers():
        router.weight.data *= 30  # experts far apart, as after training
    balance, batch = RouterBalance(model, spread=0.0, seed=0), random_batch()
    ratios = []
    with torch.no_grad():
        for step in range(100):
            model(batch.tokens, batch.positions(), batch.mask(torch.float32))
            balance.step(0.01 * (1 - step / 100))
            ratios.append(balance.imbalance())
        model.eval()(batch.tokens, batch.positions(), batch.mask(torch.float32))
    assert all(load.sum() == 0 for load in balance.loads)  # a probe is not counted
    assert ratios[-1] < 1.1 < 1.2 < ratios[0]
    assert balance.last_loads.sum(1).tolist() == [batch.tokens.numel() * SMOKE.top_k] * 2


def test_the_bias_starts_with_its_seeded_spread():
    biases = [RouterBalance(make_model(), 0.2, seed).biases for seed in (0, 0, 1)]
    for layer in biases[0]:
        assert sorted(layer[0].tolist()) == pytest.approx([-0.2, -0.2 / 3, 0.2 / 3, 0.2])
    assert all(torch.equal(a, b) for a, b in zip(biases[0], biases[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(biases[0], biases[2], strict=True))


def test_the_balance_loss_draws_the_router_to_unloaded_experts():
    model, batch = make_model().train(), random_batch()
    balance = RouterBalance(model, spread=0.2, seed=0)
    model(batch.tokens, batch.positions(), batch.mask(torch.float32))
    layers = len(balance.biases)
    loss = balance.loss()
    assert layers * 0.9 < loss < layers * SMOKE.experts and balance.losses == []
    loss.backward()
    router = next(model.routers())
    assert router.weight.grad is not None and router.weight.grad.abs().max() > 0


def test_masters_collect_what_bfloat16_would_lose():
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = MasterOptimizer(model, weight_decay=0.0, beta2=0.98, clip=1.0, muon=False)
    start = model.weight.detach().clone()
    for _ in range(40):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(lr=1e-5)
    assert model.weight.grad is None
    moved = optimizer.masters[0] - start.float()
    torch.testing.assert_close(moved, torch.full((4, 4), -4e-4), rtol=0.05, atol=1e-7)
    assert torch.equal(model.weight, optimizer.masters[0].bfloat16())


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (24, 24)])
def test_muon_updates_are_nearly_orthogonal(shape: tuple[int, ...]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = (torch.linalg.svdvals(m) for m in (matrices, orthogonal(matrices)))
    assert (before.amax(-1) / before.amin(-1)).max() > 3
    assert after.min() > 0.3 and after.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert ((orthogonal(matrices) * (u @ vh)).sum((-2, -1)) > 0).all()  # the same directions


def test_muon_moves_layers_and_adamw_the_rest():
    model = make_model()
    optimizer = MasterOptimizer(model, 0.0, 0.98, clip=1.0, muon=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    inner = {id(m) for group in optimizer.muon.groups for m in group}
    by_muon = {n for n, m in zip(names, optimizer.masters, strict=True) if id(m) in inner}
    assert by_muon == {n for n in names if "_proj" in n}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = torch.randint(2048, (1, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, tokens, torch.ones_like(tokens))
    logits, drafts = model(tokens, batch.positions(), batch.mask(torch.float32))
    (logits.square().mean() + drafts.square().mean()).backward()
    optimizer.step(1e-3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (parameter - before[name]).square().mean().sqrt()
            assert 1e-5 < moved < 2e-3, name  # of the size that AdamW would move it


def test_learning_rate_follows_steps_or_the_clock():
    by_steps = Progress(replace(SMOKE, steps=100, warmup=0.1))
    rates = []
    while by_steps.share() < 1:
        rates.append(by_steps.rate())
        by_steps.advance(10)
    assert len(rates) == 100 and max(rates) == pytest.approx(0.9, abs=0.01)
    assert rates[0] < 0.01 and rates[-1] == pytest.approx(0.01) and rates[10] == max(rates)
    by_clock = Progress(replace(SMOKE, steps=0, minutes=0.002))
    assert by_clock.share() == 0
    by_clock.advance(10)
    time.sleep(0.15)
    assert by_clock.share() == 1 and by_clock.rate() == 0


def test_probe_sees_right_answers(encoder: ChatEncoder):
    """A model that is shown the text one or two tokens ahead is always right; another never."""
    probe = Probe(encoder, samples=3, seed=0, device="cpu")
    by_tokens = {batch.tokens.sum().item(): batch for batch in probe.batches.values()}

    class Oracle(TinyModel):
        def forward(self, tokens, positions, mask):
            batch = by_tokens[tokens.sum().item()]
            return tuple(
                torch.nn.functional.one_hot(batch.ahead(d)[0], 2048).float() for d in (1, 2)
            )

    oracle = Oracle(make_model().target)
    assert set(probe.accuracy(oracle).values()) == {1.0}
    assert probe.drafting(oracle) == {"answers": 1.0, "all_tokens": 1.0}
    assert max(probe.accuracy(make_model()).values()) == 0.0


def test_a_smoke_run_learns_and_logs(smoke: Settings):
    lines = [json.loads(line) for line in (smoke.docs / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == smoke.steps
    assert lines[-1]["tokens"] == smoke.steps * smoke.batch_tokens
    assert 0 < lines[-1]["loss"] < 7.2 and set(lines[-1]["losses"]) == set(TASK_NAMES)
    result = json.loads((smoke.docs / "result.json").read_text())
    assert result["taken"] == smoke.steps and "arithmetic" in result["missed"]
