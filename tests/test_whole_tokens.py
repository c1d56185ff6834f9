"""Policies that decide once who runs all layers: drawn anew, by kind, by position, or learned."""

import pytest
import torch

import morlib
from suite import runs
from suite.runs.experiments import WORTH_TRAINING


@pytest.fixture
def by_kind(make_model):
    def make(always=2, target=3.0, **changes):
        given = dict(n_layers=6, routing="by-kind", max_recursions=1, max_len=64, target_depth=target)
        return make_model(**given | dict(options=dict(always=always)) | changes)

    return make


def uneven(n=64, seed=0, vocabulary=11):
    """Windows [n, 64] in which kinds are from frequent to rare, as in a text."""
    shares = 1.0 / (1 + torch.arange(vocabulary))
    drawn = torch.multinomial(shares, n * 64, True, generator=torch.Generator().manual_seed(seed))
    return drawn.view(n, 64)


def test_blind_tokens_run_all_layers_or_the_first_and_hold_the_target(make_model):
    model = make_model(n_layers=6, routing="blind-tokens", target_depth=3.1, max_recursions=1, max_len=64)
    tokens = torch.randint(11, (64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.train()(tokens).depth.double().mean().item() == pytest.approx(3.1, abs=0.01)
        assert model(tokens, full=1.0).depth.double().mean().item() == 6
        drawn = [model(tokens).depth for _ in range(2)]
        assert not torch.equal(*drawn)
        whole, cache = model.eval()(tokens), morlib.Cache()
        parts = [model(tokens[:, :9], cache)] + [model(tokens[:, i : i + 1], cache) for i in range(9, 64)]
    assert whole.depth.unique().tolist() == [1, 6]
    assert whole.depth.double().mean().item() == pytest.approx(3.1, abs=0.15)
    assert torch.equal(torch.cat([part.depth for part in parts], 1), whole.depth)
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-5)


@pytest.mark.parametrize("routing", ["worth-above-5", "blind-tokens-above-5"])
def test_five_layers_for_all_leave_a_seventh_of_the_tokens_to_run_twelve(make_model, routing):
    model = make_model(n_layers=12, routing=routing, target_depth=6.0, max_recursions=1, max_len=64)
    tokens = torch.randint(11, (64, 64), generator=torch.Generator().manual_seed(0))
    morlib.calibrate(model, tokens)
    depth = model(tokens).depth
    assert depth.unique().tolist() == [5, 12]
    assert depth.double().mean().item() == pytest.approx(6, abs=0.15)
    assert model.policy.shares() == [1.0] * 5 + [pytest.approx(1 / 7)] * 7


# ---- The control that gives a kind of token always the same depth ----


def test_a_kind_gets_the_same_depth_in_training_and_in_inference_and_keeps_it(by_kind):
    model, tokens = by_kind(), uneven()
    with torch.no_grad():
        first = model.train()(tokens).depth
        depths = {kind: first[tokens == kind].unique().tolist() for kind in range(11)}
        assert {len(own) for own in depths.values()} == {1} and sum(depths.values(), []).count(6) > 0
        other = uneven(seed=1).flip(1)  # other windows, of which no batch changes what was chosen
        for mode in (model.train(), model.eval()):
            again = mode(other, calibrate=True).depth
            assert all((again[other == kind] == depths[kind][0]).all() for kind in range(11))


@pytest.mark.parametrize("target", [2.5, 3.0, 5.0])
def test_kinds_fill_the_share_of_the_first_batch_and_nearly_of_the_next(by_kind, target):
    first, second = (uneven(n=256, vocabulary=200, seed=seed) for seed in (0, 1))
    found = set()
    for seed in range(5):
        model = by_kind(target=target, vocab_size=200, seed=seed).train()
        depths = [model(tokens).depth for tokens in (first, second)]
        assert depths[0].double().mean().item() == pytest.approx(target, abs=4 * 0.005)
        assert depths[1].double().mean().item() == pytest.approx(target, abs=0.06)
        assert depths[0].unique().tolist() == [2, 6]
        found.add(tuple(model.policy.deep.tolist()))
    assert len(found) == 5, "each seed draws lots of its own"


def test_frequent_kinds_are_as_likely_to_be_deep_as_rare_ones(by_kind):
    tokens, drawn = uneven(vocabulary=40), []
    policy = by_kind(vocab_size=40, target=3.0).policy  # a quarter of the tokens
    for _ in range(400):
        policy.settle_kinds(tokens.flatten())
        drawn.append(policy.deep.clone())
    chance = torch.stack(drawn).float().mean(0)
    assert chance[:3].mean().item() == pytest.approx(0.25, abs=0.07)
    assert chance[20:].mean().item() == pytest.approx(0.25, abs=0.05)


def test_kinds_that_the_first_batch_lacks_keep_the_lots_of_the_beginning(by_kind):
    model = by_kind(vocab_size=200).train()
    before = model.policy.deep.clone()
    model(uneven(vocabulary=100))
    assert torch.equal(model.policy.deep[100:], before[100:]) and before[100:].any()
    assert not torch.equal(model.policy.deep[:100], before[:100])


@torch.no_grad()
def test_by_position_it_is_the_position_that_decides(make_model):
    given = dict(n_layers=6, routing="by-position", max_recursions=1, max_len=60, target_depth=3.0)
    model = make_model(**given | dict(options=dict(always=2)))
    depth = model(uneven()[:, :60]).depth
    assert (depth == depth[0]).all() and depth.double().mean().item() == 3.0
    cache = morlib.Cache()
    parts = [model(part, cache).depth for part in uneven()[:, :60].split([7, 1, 52], 1)]
    assert torch.equal(torch.cat(parts, 1), depth)


def test_by_kind_a_cache_changes_nothing_and_the_warm_up_runs_everyone(by_kind):
    model, tokens = by_kind(), uneven(n=3)
    with torch.no_grad():
        assert (model.train()(tokens, full=1.0).depth == 6).all()
        half = [model.eval()(tokens, full=0.5).depth for _ in range(2)]
        assert torch.equal(*half) and half[0].double().mean() > model(tokens).depth.double().mean() + 0.5
        whole, cache = model.eval()(tokens), morlib.Cache()
        parts = [model(tokens[:, :9], cache)] + [model(tokens[:, i : i + 1], cache) for i in range(9, 64)]
    assert torch.equal(torch.cat([part.depth for part in parts], 1), whole.depth)
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-5)


def test_what_was_chosen_is_saved(by_kind, tmp_path):
    model, tokens = by_kind().train(), uneven()
    with torch.no_grad():
        model(tokens)
        morlib.save_model(model, tmp_path / "model.safetensors")
        other = morlib.load_model(tmp_path / "model.safetensors")[0]
        assert torch.equal(other(tokens).depth, model.eval()(tokens).depth)


@pytest.mark.parametrize("always, target, message", [
    (6, 3.0, "a target_depth above 6 and below n_layers"),
    (1, 6.0, r"a target_depth above 1 and below n_layers \(6\), not 6.0"),
    (2, None, "a target_depth above 2"),
    (0, 3.0, "option always must be 1 or more"),
    (True, 3.0, "option always must be int"),
])  # fmt: skip
def test_a_choice_must_be_left(by_kind, always, target, message):
    with pytest.raises(ValueError, match=message):
        by_kind(always=always, target=target)


# ---- The runs that compare them ----


def test_models_on_text_differ_in_who_the_third_is():
    """Six layers for all, and as many tokens that run twelve. Token worth has its own training settings."""
    made = {run.model: run for run in runs.long_runs(runs.settings(dict(preset="cpu", seeds=1)), "exp1-thin")}
    lots = ("blind-tokens", "by-kind", "by-position")
    for label in ("worth-above", *lots):
        config = made[label].config
        model = morlib.Transformer(morlib.ModelConfig(**vars(config) | dict(vocab_size=65)))
        assert model.policy.shares() == [1.0] * 6 + [pytest.approx(1 / 3)] * 6
        assert config.target_depth == 8.0 and config.d_model == made["fixed-deep"].config.d_model
    assert all(made[label].train == made["fixed-deep"].train for label in lots)
    own = vars(made["fixed-deep"].train) | WORTH_TRAINING
    assert vars(made["worth-above"].train) == own
