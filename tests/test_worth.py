"""The router of token worth: what it measures, what it decides, and that it keeps what every model keeps."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import morlib
from morlib import Cache, Decision, TrainConfig, Training, WorthRouter
from suite.runs.checkpoint import restore, snapshot

T = 6 * 12  # tokens of the windows below


class Sums:
    """A corpus of running sums modulo 11."""

    vocab_size = 11

    def draw(self, windows, length, generator):
        return torch.randint(11, (windows, length + 1), generator=generator).cumsum(1) % 11

    def windows(self, part, length, most=None):
        seed = {"train": 7, "val": 8, "heldout": 9}[part]
        return self.draw(most or 64, length, torch.Generator().manual_seed(seed))


TRAINING = TrainConfig(
    epochs=3, windows=160, batch_size=16, lr=3e-3, router_lr=3e-3, evaluations=3, eval_windows=40,
    depth_warmup=0.3,
)  # fmt: skip


@pytest.fixture
def make(make_model):
    return lambda **changes: make_model(
        **(dict(n_layers=4, routing="worth", target_depth=2.5, max_recursions=1) | changes)
    )


def windows(n=6, seed=5):
    return torch.randint(11, (n, 13), generator=torch.Generator().manual_seed(seed))


def strong(model):
    """In double precision, with larger weights (so that worth is not nearly linear in w) and no corners."""
    model.double()
    for parameter in model.parameters():
        parameter.data *= 2
    for block in model.blocks:
        block.feed_forward[1] = torch.nn.GELU()
    return model


def loss_at(model, plan, token, w):
    """The summed loss if the tokens of a plan run, one of them with weight w; and its gradient in w."""
    weight = torch.ones(T, dtype=torch.double)
    weight[token] = w
    weight.requires_grad_()
    weights = torch.stack([weight, weight])
    decision = Decision(plan.long(), None, weights, model.policy.SLOPE * (weight - 1))
    model.policy.decide = lambda step: decision
    logits = model(windows()[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), windows()[:, 1:].flatten(), reduction="sum")
    return loss.item(), torch.autograd.grad(loss, weight)[0][token].item()


def plan_of(share=0.6):
    return torch.rand(T, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("norm, R, shared", [("pre", 1, None), ("post", 1, None), ("pre", 2, 2)])
def test_the_mean_of_the_gradient_over_w_is_what_the_token_is_worth(make, norm, R, shared):
    model, plan = strong(make(norm=norm, max_recursions=R, shared_blocks=shared)), plan_of()
    points, shares = np.polynomial.legendre.leggauss(40)
    for token in plan.nonzero().flatten()[::15].tolist():
        mean = sum(-s / 2 * loss_at(model, plan, token, (x + 1) / 2)[1] for x, s in zip(points, shares))
        worth = loss_at(model, plan, token, 0.0)[0] - loss_at(model, plan, token, 1.0)[0]
        assert mean == pytest.approx(worth, abs=1e-5), token


def test_drawn_weights_measure_it_to_the_sampling_error(make):
    model, plan = strong(make()), plan_of()
    token = int(plan.nonzero()[3])
    draws = np.array([-loss_at(model, plan, token, w)[1] for w in np.random.default_rng(0).random(300)])
    worth = loss_at(model, plan, token, 0.0)[0] - loss_at(model, plan, token, 1.0)[0]
    assert abs(draws.mean() - worth) < 3 * draws.std() / len(draws) ** 0.5


def test_a_token_at_w_0_is_much_like_one_that_is_skipped(make):
    model, plan = strong(make()), plan_of()
    damped, skipped = [], []
    for token in plan.nonzero().flatten().tolist():
        full = loss_at(model, plan, token, 1.0)[0]
        damped.append(loss_at(model, plan, token, 0.0)[0] - full)
        without = plan.clone()
        without[token] = False
        skipped.append(loss_at_plan(model, without) - full)
    assert np.corrcoef(damped, skipped)[0, 1] > 0.85


def loss_at_plan(model, plan):
    model.policy.decide = lambda step: Decision(plan.long())
    logits = model(windows()[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), windows()[:, 1:].flatten(), reduction="sum").item()


def test_what_it_learns_from_is_minus_the_gradient_of_the_text_s_loss(make):
    """Whatever the loss was multiplied by, and cut at CLIP."""
    model = make().train()
    for scale, clip in ((1.0, 10.0), (1024.0, 10.0), (1.0, 0.05)):
        model.policy.CLIP = clip
        torch.manual_seed(3)
        model.policy.price.zero_()
        out = model(windows()[:, :-1], done=0.0)
        w, explored, states = (out.memory[name] for name in ("w", "explored", "states"))
        predicted = model.policy.network(states)[:, 0]
        assert 0 < explored.sum() < T and (w[~explored] == 1).all() and (w[explored] < 1).all()
        loss = F.cross_entropy(out.logits.flatten(0, 1), windows()[:, 1:].flatten(), reduction="sum")
        measured = -torch.autograd.grad(loss, w, retain_graph=True)[0]
        (loss / T * scale).backward()
        error = (predicted - measured.clamp(-clip, clip))[explored]
        own = model.policy.own_loss(out.memory, scale)
        assert own.item() == pytest.approx((error**2).mean().item() / 2, rel=1e-4)
        model.zero_grad()
        own.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {name for name, _ in model.named_parameters() if name.startswith("policy.")}


def test_micro_batches_measure_the_same_worth(make):
    """All are explored, at one weight: then what a batch measures does not depend on how it is cut."""
    seen = []
    for micro in (16, 4):
        model = make().train()
        model.policy.EXPLORED = (1.0, 1.0)
        training = Training(model, Sums(), TRAINING)
        training.micro = micro
        own_loss, measured = model.policy.own_loss, []

        def kept(memory, scale, own_loss=own_loss, measured=measured):
            measured.append(memory["w"].grad * len(memory["w"]) / scale)
            return own_loss(memory, scale)

        model.policy.own_loss = kept
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, 0.5))
            training.gradients(windows(16))
        gradient = torch.cat([p.grad.flatten() for p in model.policy.parameters()])
        seen.append((torch.cat(measured), gradient))
    (whole, gradient), (cut, gradient_of_cut) = seen
    assert torch.allclose(whole, cut, atol=1e-4)
    assert torch.allclose(gradient, gradient_of_cut, rtol=1e-3, atol=1e-5)


def test_all_that_are_explored_run_and_are_seen_as_their_weight_says(make):
    model = make().train()
    model.policy.EXPLORED = (0.5, 0.5)
    model(windows()[:, :-1])  # the price is set
    out = model(windows()[:, :-1], calibrate=False)
    memory, decision = out.memory, out.memory["decision"]
    assert decision.actions[memory["explored"]].all() and not decision.actions.all()
    worth, price = model.policy.network(memory["states"])[:, 0], model.policy.price[1]
    assert torch.equal(decision.actions.bool(), memory["explored"] | (worth > price))
    assert torch.equal(decision.weights, memory["w"].expand(2, -1))
    assert torch.equal(decision.key_bias, model.policy.SLOPE * (memory["w"] - 1))
    assert torch.equal(out.depth.flatten(), 1 + 3 * decision.actions)
    unseen = model(windows()[:, :-1], full=1.0, calibrate=False)
    assert (unseen.depth == 4).all()


def test_training_says_how_much_of_it_is_done(make):
    model, told = make(), []
    explored = model.policy.explored
    model.policy.explored = lambda done: told.append(done) or explored(done)
    morlib.train(model, Sums(), TRAINING)
    assert told == pytest.approx([step / 30 for step in range(30)])


def test_exploration_falls_from_a_tenth_to_half_of_the_training(make):
    policy = make().policy
    first, last = WorthRouter.EXPLORED
    shares = [policy.explored(done) for done in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert shares == pytest.approx([first, first, (first + last) / 2, last, last])


def test_it_learns_and_holds_the_target(make):
    model = make(target_depth=2.2)
    before = copy.deepcopy(model.policy.network.state_dict())
    morlib.train(model, Sums(), TRAINING)
    after = model.policy.network.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    measured = morlib.evaluate(model, Sums(), "val", 256)
    assert measured["effective_depth"] == pytest.approx(2.2, abs=0.05)
    assert measured == morlib.evaluate(model, Sums(), "val", 256)


def asked_at_every_layer(policy):
    """The reference: the same decision, given anew at each layer, so that each layer packs for itself."""
    forward, calls = policy.forward, []

    def forwards(step):
        calls.append(step.layer)
        return dataclasses.replace(forward(step), lasts=False)

    policy.forward = forwards
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("full", [0.0, 1.0])
@pytest.mark.parametrize("norm, R, shared", [("pre", 1, None), ("post", 2, 3)])
def test_packed_once_is_packed_at_every_layer(make, norm, R, shared, full, training):
    seen = []
    for once in (True, False):
        model = make(norm=norm, max_recursions=R, shared_blocks=shared, seed=1).train(training)
        calls = None if once else asked_at_every_layer(model.policy)
        torch.manual_seed(3)
        out = model(windows()[:, :-1], full=full, done=0.0, calibrate=True)
        (out.logits.logsumexp(-1).sum() + out.expected_depth).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if training:
            gradients["w"] = out.memory["w"].grad
        seen.append((out, gradients))
    assert calls == [0, 1, 2, 3]
    (once, gradients), (anew, of_anew) = seen
    assert once.depth.unique().tolist() == ([4] if full and training else [1, 4])
    assert torch.equal(once.actions, anew.actions) and torch.equal(once.depth, anew.depth)
    assert torch.equal(once.logits, anew.logits) and once.expected_depth == anew.expected_depth
    assert gradients.keys() == of_anew.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, of_anew[name], rtol=1e-5, atol=1e-6), name


def test_it_is_asked_once_and_only_those_explored_teach_it(make):
    model = make().train()
    layers, rows = [], []
    forward = model.policy.forward
    model.policy.forward = lambda step: layers.append(step.layer) or forward(step)
    model.policy.network.register_forward_hook(lambda module, args, made: rows.append(len(made)))
    out = model(windows()[:, :-1], done=0.0)
    out.logits.logsumexp(-1).mean().backward()
    model.policy.own_loss(out.memory, 1.0)
    assert layers == [0, 1] and rows == [T, int(out.memory["explored"].sum())]


def test_it_is_causal_and_cached_is_uncached(make):
    model = make()
    morlib.train(model, Sums(), TRAINING)
    tokens = windows(4)[:, :12]
    with torch.no_grad():
        whole, cache = model(tokens), Cache()
        parts = [model(tokens[:, :5], cache)] + [model(tokens[:, i : i + 1], cache) for i in range(5, 12)]
        changed = model(torch.cat([tokens[:, :8], (tokens[:, 8:] + 1) % 11], dim=1))
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-5)
    assert torch.equal(torch.cat([part.depth for part in parts], 1), whole.depth)
    assert whole.depth.unique().tolist() == [1, 4]
    assert torch.allclose(changed.logits[:, :8], whole.logits[:, :8], atol=1e-5)
    assert torch.equal(changed.depth[:, :8], whole.depth[:, :8])


def test_it_is_taken_up_again_and_saved_with_its_price(make, tmp_path):
    kept = []

    def keep(training):
        if training.step == 13:
            kept.append(copy.deepcopy(snapshot(training)))

    whole, again = make(), make()
    morlib.train(whole, Sums(), TRAINING, after_step=keep)
    morlib.train(again, Sums(), TRAINING, resume=lambda training: restore(training, kept[0]))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    morlib.save_model(whole, tmp_path / "model")
    loaded, _ = morlib.load_model(tmp_path / "model")
    assert whole.policy.price.abs().min() > 0
    assert torch.equal(loaded.policy.price, whole.policy.price)
    assert torch.equal(loaded(windows()[:, :-1]).depth, whole(windows()[:, :-1]).depth)


@pytest.mark.parametrize("routing, R", [("worth", 1), ("mor", 2)])
def test_a_trained_model_is_held_to_any_depth(make, routing, R):
    model = make(routing=routing, max_recursions=R)
    morlib.train(model, Sums(), TRAINING)
    weights, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    own = morlib.evaluate(model, Sums(), "val", 256)
    for target in (1.4, 3.4):
        found = morlib.evaluate(model, Sums(), "val", 256, target_depth=target)
        assert found["effective_depth"] == pytest.approx(target, abs=0.1)
        assert found["loss"] != own["loss"]
    assert model.cfg.target_depth == 2.5 and torch.equal(draws, torch.get_rng_state())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert morlib.evaluate(model, Sums(), "val", 256) == own
    exact = morlib.at_depth(model.double(), Sums(), 3.4)
    assert {tensor.dtype for tensor in exact.parameters()} == {torch.float64}, "a copy in its own precision"


@pytest.mark.parametrize("routing", ["none", "mor"])
def test_a_model_without_a_budget_is_held_to_no_depth(make, routing):
    model = make(routing=routing, target_depth=None)
    with pytest.raises(ValueError, match=f"routing {routing} holds no target depth"):
        morlib.evaluate(model, Sums(), "val", target_depth=2.0)


@pytest.mark.parametrize("target", [None, 1.0, 4.0])
def test_a_target_that_leaves_no_choice_is_refused(make, target):
    with pytest.raises(ValueError, match=r"target_depth above 1 and below n_layers \(4\)"):
        make(target_depth=target)
