"""What routing executes, what it counts, and what gradients and caches see."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import morlib
from morlib import FORWARD, NOT_ASKED, RECURSE, SKIP

ROUTED = ("none", "mor", "random")
POLICIES = (*ROUTED, "frozen")  # a router of mor that does not learn
SHAPES = [
    dict(max_recursions=1, shared_blocks=None, granularity="token", norm="pre"),
    dict(max_recursions=2, shared_blocks=None, granularity="token", norm="post"),
    dict(max_recursions=3, shared_blocks=2, granularity="token", norm="pre"),
    dict(max_recursions=2, shared_blocks=1, granularity="sample", norm="pre"),
    dict(max_recursions=3, shared_blocks=None, granularity="sample", norm="post"),
]


def tokens(B=3, L=9, V=11, seed=1):
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(seed))


def masked_step(self, blocks, x, running, pasts, B, L):
    """The reference: computes every token, keeps what was named, and writes attention out in full."""
    for block in blocks:
        x = masked_block(block, x, running, B, L)
    return x


def masked_block(block, x, running, B, L):
    chosen, weight = running.places, running.weight
    D, H = x.shape[1], block.attention.n_heads
    active = torch.zeros(B * L, dtype=torch.bool).index_fill(0, chosen, True)
    place = torch.arange(L)
    itself = torch.eye(L, dtype=torch.bool)
    seen = (place[None, :] <= place[:, None]) & (active.view(B, 1, 1, L) | itself)
    bias = torch.zeros(B * L)
    if running.key_bias is not None:
        bias = bias.index_put((chosen,), running.key_bias)
    bias = torch.where(itself, torch.zeros(()), bias.view(B, 1, 1, L))

    def attention(h):
        q, k, v = block.attention.qkv(h).view(B, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(D // H) + bias
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        return block.attention.proj((weights @ v).transpose(1, 2).reshape(B * L, D))

    if block.pre:
        y = x + attention(block.norm1(x))
        y = y + block.feed_forward(block.norm2(y))
    else:
        y = block.norm1(x + attention(x))
        y = block.norm2(y + block.feed_forward(y))
    scale = torch.ones(B * L)
    if weight is not None:
        scale = scale.index_put((chosen,), weight)
    return torch.where(active[:, None], x + scale[:, None] * (y - x), x)


def loss_and_gradients(model, x, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x, sampling=True)
    (F.cross_entropy(out.logits.flatten(0, 1), x.flatten()) + 0.1 * out.expected_depth).backward()
    parameters = dict(model.named_parameters())
    return out, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}


def clear_thresholds(monkeypatch):
    """In training too, thresholds keep clear of the tokens that set them, which rounding might move over."""
    apart = morlib.apart

    def clear(threshold, values, step):
        return apart(threshold, values, dataclasses.replace(step, sampling=False))

    monkeypatch.setattr(morlib, "apart", clear)


def assert_equals_masked(model, x, monkeypatch):
    """Packed execution and the reference agree: actions, logits, gradients. Returns the packed Output."""
    clear_thresholds(monkeypatch)
    packed, packed_gradients = loss_and_gradients(model, x)
    monkeypatch.setattr(morlib.Transformer, "run_step", masked_step)
    masked, masked_gradients = loss_and_gradients(model, x)
    assert (packed.actions == masked.actions).all()
    assert torch.allclose(packed.logits, masked.logits, atol=1e-5)
    for name, gradient in packed_gradients.items():
        assert torch.allclose(gradient, masked_gradients[name], atol=1e-5), name
    return packed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing, estimator", [("mor", "scaled"), ("mor", "gumbel"), ("random", "scaled")])
def test_packed_execution_equals_the_masked_reference(make_model, monkeypatch, shape, routing, estimator):
    model, x = make_model(routing=routing, estimator=estimator, **shape), tokens()
    packed = assert_equals_masked(model, x, monkeypatch)
    assert (packed.actions == SKIP).any() and (packed.actions >= FORWARD).any()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_exploring_packed_equals_the_masked_reference(make_model, monkeypatch, shape):
    """A plan that lasts, weights on changes and biases of keys, and the gradient of what is explored."""
    model, measured = make_model(routing="worth", target_depth=2.0, **shape).train(), []
    model.policy.EXPLORED = (0.5, 0.5)
    decide = model.policy.decide
    model.policy.decide = lambda step: measured.append(step.memory) or decide(step)
    packed = assert_equals_masked(model, tokens(), monkeypatch)
    assert packed.depth.unique().tolist() == [1, 3]
    of_packed, of_masked = (memory["w"].grad for memory in measured)
    assert of_packed.abs().max() > 1e-4 and torch.allclose(of_packed, of_masked, atol=1e-6)


@pytest.mark.parametrize("dice", range(10, 16))  # these draw every value of each choice
@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize("training", (False, True))
def test_depth_is_what_hooks_on_the_blocks_count(make_model, dice, routing, training):
    draw = random.Random(dice)
    shape = dict(
        max_recursions=draw.randint(1, 4),
        shared_blocks=draw.choice([None, 1, 2, 3]),
        granularity=draw.choice(["token", "sample"]),
        norm=draw.choice(["pre", "post"]),
    )
    model, x = (
        make_model(routing=routing, **shape).train(training),
        tokens(B=draw.randint(1, 5), L=draw.randint(1, 12)),
    )
    linear_rows, seen = [], []
    for block in model.blocks:
        block.feed_forward[0].register_forward_hook(
            lambda module, inputs, output: linear_rows.append(inputs[0].numel() // 16)
        )
        block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].row))
    out = model(x)
    assert out.depth.shape == x.shape and int(out.depth.sum()) == sum(linear_rows) == sum(
        len(row) for row in seen
    )
    by_sequence = torch.bincount(torch.cat([torch.zeros(0, dtype=torch.long), *seen]), minlength=len(x))
    assert (by_sequence == out.depth.sum(1)).all(), "and sequence by sequence"
    ran = (out.actions == FORWARD) | (out.actions == RECURSE)
    assert (ran.sum((0, 1)) == out.depth).all()
    if routing == "none":
        assert (out.depth == 3).all()
        return
    asked_again = out.actions[:, 1:] != NOT_ASKED
    assert (asked_again == (out.actions[:, :-1] == RECURSE)).all(), (
        "exactly the tokens that chose recurse are asked again"
    )


@pytest.mark.parametrize("loss", ("cross-entropy", "depth"))
@pytest.mark.parametrize("granularity", ("token", "sample"))
@pytest.mark.parametrize("estimator", ("scaled", "gumbel"))
def test_a_gradient_reaches_every_router_parameter(make_model, loss, granularity, estimator):
    model, x = make_model(routing="mor", granularity=granularity, estimator=estimator), tokens(B=8, L=12)
    torch.manual_seed(0)
    out = model(x, sampling=True)
    value = out.expected_depth if loss == "depth" else F.cross_entropy(out.logits.flatten(0, 1), x.flatten())
    value.backward()
    for name, parameter in model.policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_no_gradient_where_it_is_cut_or_frozen(make_model):
    for changes in (dict(routing="mor", estimator="cut"), dict(routing="frozen")):
        model, x = make_model(**changes), tokens()
        out = model(x, sampling=True)
        assert not out.expected_depth.requires_grad, "neither router nor backbone hears of the depth"
        F.cross_entropy(out.logits.flatten(0, 1), x.flatten()).backward()
        assert all(p.grad is None for p in model.policy.parameters())
        assert model.blocks[0].attention.qkv.weight.grad is not None


@pytest.mark.parametrize("estimator", ("scaled", "gumbel"))
def test_the_penalty_lowers_expected_depth(make_model, estimator):
    def after(penalty):
        model, x = make_model(routing="mor", estimator=estimator), tokens(B=16, L=12)
        optimizer = torch.optim.Adam(model.policy.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(15):
            loss = penalty * model(x, sampling=True).expected_depth
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model(x, sampling=True).expected_depth.item()

    assert after(1.0) < 0.8 * after(0.0)


def test_expected_depth_is_the_mean_of_sampled_depth(make_model):
    model, x = make_model(routing="mor", estimator="gumbel", max_recursions=3), tokens(B=64, L=12)
    torch.manual_seed(0)
    outs = [model(x, sampling=True) for _ in range(20)]
    sampled = torch.stack([out.depth.float().mean() for out in outs]).mean()
    expected = torch.stack([out.expected_depth for out in outs]).mean()
    assert abs(sampled - expected) < 0.05


@pytest.mark.parametrize("R", (1, 2, 3))
def test_expected_depth_has_the_gradient_of_the_true_expectation(make_model, R):
    """One layer, routers blind to the state: E = q + p q + p^2 q + ... in closed form."""
    model, x = make_model(routing="mor", estimator="gumbel", n_layers=1, max_recursions=R), tokens(B=64, L=12)
    last = model.policy.routers[0][2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.3, -0.2, 0.4]))
    torch.manual_seed(0)
    gradients = []
    for _ in range(60):
        model.zero_grad()
        model(x, sampling=True).expected_depth.backward()
        gradients.append(last.bias.grad.clone())
    logits = last.bias.detach().clone().requires_grad_()
    p = logits.softmax(-1)
    sum((1 - p[SKIP]) * p[RECURSE] ** r for r in range(R)).backward()
    assert torch.allclose(torch.stack(gradients).mean(0), logits.grad, atol=0.01)


def test_all_forward_equals_fixed_depth(make_model):
    fixed, routed, x = make_model(routing="none"), make_model(routing="mor"), tokens()
    routed.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        for router in routed.policy.routers:
            router[2].weight.zero_()
            router[2].bias.copy_(torch.tensor([-50.0, 50.0, -50.0]))
    out, reference = routed(x), fixed(x)
    assert (out.depth == reference.depth).all() and torch.equal(out.logits, reference.logits)


@pytest.mark.parametrize("norm", ("pre", "post"))
def test_all_skip_equals_embedding_to_head(make_model, norm):
    model, x = make_model(routing="random", target_depth=0.0, norm=norm), tokens()
    out = model(x)
    states = model.embed(x) + model.positions[: x.shape[1]]
    assert int(out.depth.sum()) == 0 and torch.allclose(out.logits, model.head(model.norm(states)), atol=1e-6)


@pytest.mark.parametrize("estimator", ("scaled", "gumbel"))
@pytest.mark.parametrize("action", (SKIP, FORWARD, RECURSE))
def test_the_learned_router_when_none_or_all_are_active(make_model, monkeypatch, action, estimator):
    model, x = make_model(routing="mor", estimator=estimator), tokens()
    with torch.no_grad():
        for router in model.policy.routers:
            router[2].bias[action] += 4.0  # decides for nearly every token, and keeps a gradient
            router[2].weight *= 0.1
    model.policy.cfg = dataclasses.replace(model.cfg, temperature=3.0)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1.0))
    packed = assert_equals_masked(model, x, monkeypatch)
    assert (packed.depth == {SKIP: 0, FORWARD: 3, RECURSE: 6}[action]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ROUTED)
def test_it_is_causal_and_cached_is_uncached(make_model, shape, routing):
    model, x = make_model(routing=routing, **shape), tokens(B=3, L=12)
    whole, cache = model(x), morlib.Cache()
    for t in (1, 4, 8):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = model(changed).logits
        assert torch.allclose(whole.logits[:, :t], after[:, :t], atol=1e-5)
        assert not torch.allclose(whole.logits[:, t], after[:, t], atol=1e-5)
    parts = [model(piece, cache) for piece in x.split([4, 1, 1, 3, 1, 1, 1], dim=1)]
    assert torch.equal(torch.cat([part.depth for part in parts], 1), whole.depth)
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-4)
    assert cache.tokens() == int(whole.depth.sum()), "the cache holds exactly the executed tokens"
    held = cache.bytes() - sum(t.nbytes for t in cache.prefix.values())
    assert held == 2 * 16 * 4 * int(whole.depth.sum()), "and nothing more is allocated"


@pytest.mark.parametrize("routing", ("mor", "worth"))
def test_no_token_stands_on_a_threshold(make_model, routing):
    """The tokens that set the thresholds take the same way one by one, to the last of them."""
    for seed in range(4):
        model, x = make_model(seed, routing=routing, target_depth=2.0, max_len=48), tokens(B=32, L=48)
        with torch.no_grad():
            model.embed.weight *= 20  # differently sure of different tokens
        morlib.calibrate(model, x)
        whole, cache = model(x).actions, morlib.Cache()
        pieces = torch.cat([model(piece, cache).actions for piece in x.split(1, dim=1)], -1)
        assert (whole == pieces).all()


def test_a_threshold_keeps_clear_of_values_that_rounding_could_move():
    step = morlib.StepInput(0, 0, *[torch.zeros(1)] * 2, 1, 0, torch.zeros(1), False, True, 0.0)
    values = torch.tensor([0.0, 1.0, 1.000001, 1.000002, 1.5])
    stands = morlib.apart(values[1], values, step)
    assert 1.000005 < stands < 1.1 and (values - stands).abs().min() > 5e-6
    assert morlib.apart(values[4], values, step) > 1.5
    step.sampling = True  # a batch in training holds for itself alone
    assert morlib.apart(values[1], values, step) == 1.0


def test_a_threshold_among_values_that_lie_close_together_stays_where_it_is_asked():
    step = morlib.StepInput(0, 0, *[torch.zeros(1)] * 2, 1, 0, torch.zeros(1), False, True, 0.0)
    values = torch.linspace(0, 0.1, 20_000)  # no gap of 2e-5 anywhere
    stands = morlib.apart(morlib.quantile(values, 0.5), values, step)
    assert (values > stands).float().mean() == pytest.approx(0.5, abs=0.006)
    values[10_050] += 4e-6  # the widest gap near it
    stands = morlib.apart(morlib.quantile(values, 0.5), values.sort()[0], step)
    assert (values - stands).abs().min() > 3e-6


def test_a_policy_that_is_none_is_refused(monkeypatch):
    monkeypatch.setitem(morlib.POLICIES, "mine", torch.nn.Linear)
    with pytest.raises(ValueError, match=r"routing mine: a policy must subclass morlib\.Policy"):
        morlib.ModelConfig(vocab_size=5, routing="mine")


@torch.no_grad()
def test_a_large_batch_decodes_as_it_reads_and_its_cache_follows_the_depth(make_model):
    """Rows that hold differently many tokens, or all as many; what is allocated is read off the tensors."""
    x, shape = tokens(B=32, L=150), dict(max_recursions=1, max_len=150, n_layers=12)
    for routing, target in (("none", None), ("random", 6.0), ("random", 8.0)):
        model = make_model(routing=routing, target_depth=target, **shape)
        whole, cache, logits = model(x), morlib.Cache(), []
        for piece in x.split([7] + [1] * 143, dim=1):
            logits.append(model(piece, cache).logits)
        assert torch.allclose(torch.cat(logits, 1), whole.logits, atol=1e-4)
        assert cache.tokens() == int(whole.depth.sum())
        assert cache.bytes() == sum(kv.numel() * 4 for step in cache.steps.values() for kv in step.kv)
        assert cache.bytes() <= 2 * 16 * 4 * cache.tokens() * morlib.StepCache.GROWTH * 1.005, (
            "little more than what is held"
        )
        if routing == "none":
            of_all = cache.bytes()
        assert cache.bytes() / of_all == pytest.approx(whole.depth.float().mean().item() / 12, rel=0.01)


@pytest.mark.parametrize(
    "first", [((256, 257), (1, 0)), ((256, 256), (1, 1))]
)  # apart from the start, and together until there is room to spare
def test_rows_part_and_catch_up(first):
    step, seen = morlib.StepCache(2), [[], []]
    for new in (*first, (0, 1), (1, 0), (1, 1), (2, 2), (0, 3), (3, 0)):
        row, kv, q = (
            torch.tensor([0] * new[0] + [1] * new[1]),
            torch.randn(sum(new), 2, 2, 8),
            torch.randn(sum(new), 2, 8),
        )
        made = step.attend(q, kv, morlib.Packing(row * max(new), 2, max(new)))
        for b, (queries, fresh, y) in enumerate(zip(q.split(new), kv.split(new), made.split(new))):
            seen[b] += fresh
            held = torch.stack(seen[b])
            for i in range(len(queries)):
                k, v = held[: len(held) - len(queries) + 1 + i].unbind(1)  # [n, H, D/H]
                weight = torch.einsum("hd,nhd->hn", queries[i], k / 8**0.5).softmax(-1)
                assert torch.allclose(y[i], torch.einsum("hn,nhd->hd", weight, v), atol=1e-5)
    assert step.count == [len(rows) for rows in seen]
    for kv, held in zip(step.kv, step.count):
        assert held <= kv.shape[3] <= held * step.GROWTH + 1


@pytest.mark.parametrize("routing", POLICIES)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_cached_generation_equals_uncached_past_the_context(make_model, routing, temperature):
    model, prompt = (
        make_model(routing=routing, granularity="sample" if routing == "frozen" else "token"),
        tokens(B=2, L=5),
    )
    made = [
        morlib.generate(
            model,
            prompt,
            30,
            use_cache=cached,
            temperature=temperature,
            generator=torch.Generator().manual_seed(3),
        )
        for cached in (True, False)
    ]
    assert made[0].shape == (2, 35) and torch.equal(made[0], made[1]) and torch.equal(made[0][:, :5], prompt)


def test_generation_that_fails_leaves_the_model_in_training(make_model, monkeypatch):
    model = make_model().train()

    def fails(*args):
        assert not model.training
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "readout", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        morlib.generate(model, torch.tensor([1, 2]), 3)
    assert model.training


def test_rates_in_arrays_are_saved(make_model, tmp_path):
    rates = torch.full((3, 2, 3), 1 / 3).numpy()
    path = tmp_path / "random.safetensors"
    for written in (rates, list(rates), [list(layer) for layer in rates]):
        model = make_model(routing="random", action_rates=written)
        morlib.save_model(model, path)
        assert morlib.load_model(path)[0].cfg == model.cfg


def test_why_weights_do_not_fit_is_said(make_model, tmp_path):
    path, model = tmp_path / "mor.safetensors", make_model(routing="mor")
    state = model.state_dict()
    model.state_dict = lambda: {name: t for name, t in state.items() if name != "policy.bias"}
    morlib.save_model(model, path)
    with pytest.raises(ValueError, match=r"mor.safetensors is not a model .*Missing key.*policy\.bias"):
        morlib.load_model(path)


def test_numbers_of_numpy_are_taken_by_generate(make_model):
    model, prompt = make_model(routing="mor"), torch.tensor([[1, 2, 3]])
    mine, theirs = (
        morlib.generate(model, prompt, kind(4), temperature=half, generator=torch.Generator().manual_seed(0))
        for kind, half in ((int, 0.5), (np.int64, np.float32(0.5)))
    )
    assert mine.shape == (1, 7) and torch.equal(mine, theirs)


def test_random_draws_the_asked_depth(make_model):
    x = tokens(B=64, L=12)
    for target in (1.0, 2.0, 3.0, 4.5):
        model = make_model(routing="random", target_depth=target, max_recursions=2)
        assert abs(model(x).depth.float().mean().item() - target) < 0.05, "inference"
        assert abs(model(x, sampling=True).depth.float().mean().item() - target) < 0.02, "training"


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(1, 13, dtype=torch.long), "longer than the model's max_len of 12"),
    (torch.full((1, 4), 11), "token id 11 is out of range"),
    (torch.full((1, 4), -1), "token id -1 is out of range"),
    (torch.zeros(1, 4), "tokens must be a non-empty int64 tensor"),
    (torch.zeros(4, dtype=torch.int32), "int64"),
    (torch.zeros(1, 0, dtype=torch.long), "non-empty"),
])  # fmt: skip
def test_wrong_tokens_are_explained(make_model, bad, message):
    model = make_model(routing="mor")
    with pytest.raises(ValueError, match=message):
        model(bad)
    with pytest.raises(ValueError, match=message):
        morlib.generate(model, bad, 3)


@pytest.mark.parametrize("R", (1, 2, 3))
@pytest.mark.parametrize("target", (1.0, 3.0, 4.0, 6.0, 7.5, 8.0, 11.0, 12.0, 15.0, 24.0))
def test_a_depth_budget_adds_up(R, target):
    """Over N = 12 layers, at most N and R applications: what the layers may spend is the target."""
    if target > 12 * R:
        pytest.skip("beyond N * R")
    budget = morlib.depth_budget(
        morlib.ModelConfig(vocab_size=9, n_layers=12, max_recursions=R, target_depth=target)
    )
    assert sum(run * sum(again**r for r in range(R)) for run, again in budget) == pytest.approx(target)
    assert all(0 <= share <= 1 for pair in budget for share in pair) and budget[0][0] >= budget[1][0]
    routed = [run for run, _ in budget if run < 1]
    assert target >= 12 or len(routed) > 0, "some layer is left to choose in"


@pytest.mark.parametrize("R", (1, 2, 3))
@pytest.mark.parametrize("estimator", ("scaled", "gumbel"))
@pytest.mark.parametrize("target", (3.0, 8.0, 12.0, 15.0))
def test_calibration_meets_its_target(make_model, R, target, estimator):
    if target > 12 * R:
        pytest.skip("beyond N * R")
    model, x = (
        make_model(routing="mor", n_layers=12, max_recursions=R, target_depth=target, estimator=estimator),
        tokens(B=128, L=12),
    )
    for sampling in (True, False):
        for _ in range(3):
            depth = model(x, sampling=sampling, calibrate=True).depth.float().mean().item()
            assert depth == pytest.approx(target, abs=0.1), "in every batch, not on average"
    assert model(x).depth.float().mean().item() == pytest.approx(target, abs=0.1), "and it stays"


def test_training_by_probability_decides_as_inference_does(make_model, monkeypatch):
    clear_thresholds(monkeypatch)
    model, x = make_model(routing="mor", target_depth=1.7).train(), tokens(B=16, L=12)
    assert torch.equal(model(x, sampling=True).actions, model(x, sampling=False).actions)


def test_a_change_is_scaled_by_the_probability_of_its_choices(make_model):
    """Without a budget: the change of an application, times the probabilities of what led to it."""
    model, x = make_model(routing="mor", n_layers=1), tokens()
    out = model(x)
    state = (model.embed(x) + model.positions[: x.shape[1]]).flatten(0, 1)
    skip, forward, recurse = model.policy.routers[0](F.layer_norm(state, state.shape[-1:])).unbind(-1)
    execute, again = torch.sigmoid(torch.logaddexp(forward, recurse) - skip), torch.sigmoid(recurse - forward)
    chosen = torch.stack([skip, forward, recurse], -1).argmax(-1)
    assert {0, 1, 2} <= set(chosen.tolist()), "every action occurs"

    def change(before, places):
        return model.blocks[0](before[places], morlib.Packing(places, *x.shape)) - before[places]

    places = (chosen != SKIP).nonzero()[:, 0]
    state = state.index_add(0, places, execute[places, None] * change(state, places))
    places = (chosen == RECURSE).nonzero()[:, 0]
    logits = model.policy.routers[0](F.layer_norm(state[places], state.shape[-1:]))
    runs = logits.argmax(-1) != SKIP
    both = torch.sigmoid(torch.logaddexp(logits[:, 1], logits[:, 2]) - logits[:, 0]) * again[places]
    state = state.index_add(0, places[runs], both[runs, None] * change(state, places[runs]))
    assert torch.allclose(out.logits.flatten(0, 1), model.head(model.norm(state)), atol=1e-5)


def test_no_router_is_asked_where_everyone_runs(make_model):
    model = make_model(routing="mor", n_layers=6, target_depth=4.0)
    asked = []
    for layer, router in enumerate(model.policy.routers):
        router.register_forward_hook(lambda *_, layer=layer: asked.append(layer))
    model(tokens())
    routed = [layer for layer, (run, _) in enumerate(morlib.depth_budget(model.cfg)) if run < 1]
    assert set(asked) == set(routed) and 0 < len(routed) < 6


QUARTER = 0.55 + 0.45 * math.cos(math.pi / 4)
SCHEDULES = {
    "cosine": {100: 1.0, 325: QUARTER, 550: 0.55, 775: 1.1 - QUARTER, 1000: 0.1},
    "constant": {100: 1.0, 550: 1.0, 1000: 1.0},
    "wsd": {100: 1.0, 550: 1.0, 799: 1.0, 850: 0.775, 900: 0.55, 1000: 0.1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_and_then_falls_as_its_schedule_says(schedule):
    tc = morlib.TrainConfig(warmup=0.1, schedule=schedule)
    expected = {0: 0.01, 49: 0.5, 99: 1.0} | SCHEDULES[schedule]
    assert {step: morlib.learning_rate(step, 1000, tc) for step in expected} == pytest.approx(expected)


def test_learning_rates_follow_the_share_of_tokens(make_model):
    model = make_model(routing="mor", n_layers=6, target_depth=4.0)
    training = morlib.TrainConfig(lr=1e-2, router_lr=1e-3, weight_decay=0.3, share_power=0.5)
    given = {
        id(p): (group["lr"], group["weight_decay"])
        for group in morlib.build_optimizer(model, training).param_groups
        for p in group["params"]
    }
    assert len(given) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, decay = given[id(parameter)]
        if name.startswith("policy."):
            assert (rate, decay) == (1e-3, 0.0), name
        else:
            share = (
                morlib.depth_budget(model.cfg)[int(name.split(".")[1])][0]
                if name.startswith("blocks.")
                else 1.0
            )
            assert rate == pytest.approx(1e-2 * share**0.5) and decay == (
                0.3 if parameter.dim() == 2 else 0.0
            ), name
    assert len({rate for rate, _ in given.values()}) > 2


def test_one_seed_gives_every_policy_the_same_backbone(make_model):
    models = [make_model(routing=routing) for routing in POLICIES]
    for name, value in models[0].state_dict().items():
        assert all(torch.equal(value, model.state_dict()[name]) for model in models[1:]), name


def test_configurations_survive_json(make_model):
    cfg = make_model(routing="mor").cfg
    assert morlib.ModelConfig(**dataclasses.asdict(cfg)) == cfg


# ---- Promises that are easy to break ----


def test_weights_and_key_biases_count_without_actions_too(make_model, monkeypatch):
    class Scaled(morlib.Policy):
        spelt_out = False

        def forward(self, step):
            T = len(step.index)
            w = torch.full((2, T), 0.3)
            actions = torch.full((T,), FORWARD) if self.spelt_out else None
            return morlib.Decision(actions, weights=w, key_bias=torch.linspace(-1, 1, T))

    monkeypatch.setitem(morlib.POLICIES, "scaled-by-hand", Scaled)
    model = make_model(routing="scaled-by-hand", max_recursions=1)
    tokens = torch.arange(10).view(2, 5)
    short = model(tokens).logits
    monkeypatch.setattr(Scaled, "spelt_out", True)
    assert torch.equal(short, model(tokens).logits)
    assert not torch.allclose(short, make_model(routing="none")(tokens).logits, atol=1e-3)


def test_a_weight_of_an_earlier_recursion_stays_where_a_later_one_gives_none(make_model, monkeypatch):
    class Twice(morlib.Policy):
        ones = False

        def forward(self, step):
            T = len(step.index)
            first = torch.stack([torch.full((T,), 0.5), torch.full((T,), 0.25)])
            if step.recursion == 0:
                return morlib.Decision(torch.full((T,), RECURSE), weights=first)
            return morlib.Decision(torch.full((T,), FORWARD), weights=torch.ones(2, T) if self.ones else None)

    monkeypatch.setitem(morlib.POLICIES, "twice-by-hand", Twice)
    model = make_model(routing="twice-by-hand", max_recursions=2)
    tokens = torch.arange(10).view(2, 5)
    without = model(tokens).logits
    monkeypatch.setattr(Twice, "ones", True)
    assert torch.equal(without, model(tokens).logits)


def test_a_target_depth_a_rounding_below_all_layers_is_all_of_them(make_model):
    target = sum([0.1] * 10) * 3  # 2.9999999999999996
    cfg = morlib.ModelConfig(vocab_size=5, n_layers=3, target_depth=target, max_recursions=1)
    budget = morlib.depth_budget(cfg)
    assert target < 3 and all(share == pytest.approx(1) for share, _ in budget)
    assert make_model(routing="mor", target_depth=target)(torch.arange(5)[None]).depth.shape == (1, 5)


def test_what_is_generated_can_be_trained_on(make_model):
    model = make_model()
    for prompt in (torch.arange(4), torch.arange(4)[None]):
        written = morlib.generate(model, prompt, 3)
        model(written.view(1, -1)).logits.sum().backward()
    assert model.head.weight.grad is not None


def test_tied_weights_are_saved_and_a_training_that_cannot_begin_ends_in_evaluation(
    make_model, corpus, quick_training, monkeypatch, tmp_path
):
    class Tied(morlib.Policy):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.b.weight = self.a.weight

    monkeypatch.setitem(morlib.POLICIES, "tied", Tied)
    model = make_model(routing="tied", vocab_size=corpus.vocab_size)
    morlib.save_model(model, tmp_path / "tied.safetensors")
    again = morlib.load_model(tmp_path / "tied.safetensors")
    again = again[0] if isinstance(again, tuple) else again
    assert torch.equal(again.policy.b.weight, model.policy.a.weight)

    def refuse(training):
        raise ValueError("damaged")

    model.train()
    with pytest.raises(ValueError, match="damaged"):
        morlib.train(model, corpus, quick_training, resume=refuse)
    assert not model.training
