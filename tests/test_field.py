"""The systems of the field: each against its equations written out, and what every model keeps."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import morlib
from morlib import FORWARD, Cache
from suite import cost, field, runs, texts
from suite.field.dr import changed, through
from suite.field.exits import exit_losses, log_stopping
from suite.field.lora import MATRICES
from suite.field.moe import ExpertBlock

V, L = 11, 12
SYSTEMS = {
    "mod": dict(routing="mod", n_layers=4, capacity=0.4),
    "act": dict(routing="act", n_layers=5, options=dict(bias=-1.0)),
    "ponder": dict(routing="ponder", n_layers=5),
    "exit": dict(routing="exit", n_layers=4),
    "exit-confidence": dict(routing="exit-confidence", n_layers=4, options=dict(threshold=0.03)),
    "mor-expert": dict(routing="mor-expert", n_layers=5),
    "mor-expert, two blocks": dict(routing="mor-expert", n_layers=6, shared_blocks=2),
    "mor-expert, one block": dict(routing="mor-expert", n_layers=3, options=dict(ends=False)),
    "mor-token": dict(routing="mor-token", n_layers=5),
    "mor-token, one block": dict(routing="mor-token", n_layers=3, options=dict(ends=False)),
    "mor-token, two blocks": dict(routing="mor-token", n_layers=6, shared_blocks=2),
    "mor-expert-sharing": dict(routing="mor-expert-sharing", n_layers=6, shared_blocks=2),
    "mor-token-sharing": dict(routing="mor-token-sharing", n_layers=5),
    "lora": dict(routing="lora", n_layers=4, shared_blocks=2, options=dict(rank=3)),
    "sliced": dict(routing="sliced", n_layers=4, options=dict(groups=4)),
    "sliced, two blocks": dict(routing="sliced", n_layers=6, shared_blocks=2, options=dict(groups=5)),
    "moe-top1": dict(routing="moe", n_layers=2),
    "moe-top2": dict(routing="moe", n_layers=2, options=dict(top=2)),
    "mor-moe": dict(routing="mor-moe", n_layers=5),
    "by-kind-sees-all": dict(
        routing="by-kind-sees-all", n_layers=5, target_depth=3.0, options=dict(always=2)
    ),
    "dr": dict(routing="dr", n_layers=4, max_recursions=1),
    "dr, repeats": dict(routing="dr", n_layers=4, max_recursions=2),
}
WRITTEN_OUT = [name for name in SYSTEMS if name != "dr, repeats"]  # which has a test of its own
ADAPTIVE = [name for name in SYSTEMS if not name.startswith(("moe", "lora", "sliced"))]


@pytest.fixture
def make(make_model):
    """A system's model whose router has an opinion: its weights are ten times those it begins with."""

    def make(name, **changes):
        model = make_model(**SYSTEMS[name] | changes)
        for parameter_name, parameter in model.policy.named_parameters():
            if parameter_name.endswith("weight"):
                parameter.data *= 10
        for parameter_name, parameter in model.blocks.named_parameters():
            if ".up." in parameter_name:  # zero at first
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


def tokens(B=3, length=L, seed=1):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


# ---- The equations, written out for every token ----


def attention(block, h, keys, shown, size):
    """Queries of h, keys and values of `keys` [B, L, D]: each looks at those shown [B, L], and at itself, in
    its own slice of so many positions."""
    B, L, D = h.shape
    H = block.attention.n_heads
    q = block.attention.qkv(h).view(B, L, 3, H, D // H)[:, :, 0]
    k, v = block.attention.qkv(keys).view(B, L, 3, H, D // H)[:, :, 1:].unbind(2)
    seen = torch.ones(L, L, dtype=torch.bool).tril() & (shown[:, None] | torch.eye(L, dtype=torch.bool))
    seen &= torch.block_diag(*[torch.ones(size, size)] * L)[:L, :L].bool()
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D // H)
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return block.attention.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, L, D))


def feed_forward(block, h):
    if not isinstance(block, ExpertBlock):
        return block.feed_forward(h)
    experts, rows = block.feed_forward, []
    for row in h.flatten(0, 1):
        p = (experts.router.weight @ row).softmax(0)
        best = p.sort(descending=True).indices[: experts.top]
        share = p[best] / p[best].sum() if experts.top > 1 else p[best]
        y = torch.zeros_like(row)
        for e, gate in zip(best, share):
            hidden = (experts.expand[e] @ row + experts.bias[0][e]).relu()
            y = y + gate * (experts.contract[e] @ hidden + experts.bias[1][e])
        rows.append(y)
    return torch.stack(rows).view(h.shape)


def apply(block, x, shown, others=None, size=L):
    """A block on all of x [B, L, D]; keys are of the tokens shown, of these or of other states."""
    others = x if others is None else others
    if block.pre:
        x = x + attention(block, block.norm1(x), block.norm1(others), shown, size)
        return x + feed_forward(block, block.norm2(x))
    x = block.norm1(x + attention(block, x, others, shown, size))
    return block.norm2(x + feed_forward(block, x))


def merged(block, depth):
    """A plain block with the weights that a relaxed one has at a depth; gradients reach both."""
    plain = copy.deepcopy(block)
    for which, matrix in enumerate(MATRICES):
        linear = plain.get_submodule(matrix)
        weight = block.get_submodule(matrix).weight + block.up[which][depth] @ block.down[which][depth]
        del linear.weight
        linear.weight = weight
        linear.bias = block.get_submodule(matrix).bias
    plain.norm1, plain.norm2 = block.norm1, block.norm2
    return plain


def reference(model, x, ran):
    """Logits of tokens x [B, L] if at each layer those ran that are named, bool [N, B, L]."""
    name, policy, N = model.cfg.routing, model.policy, model.cfg.n_layers
    s = model.embed(x) + model.positions[: x.shape[1]]
    everyone, mean, mass = torch.ones_like(ran[0]), torch.zeros_like(s), torch.zeros_like(s[..., 0])
    entered = {}  # the states with which a shared block was first entered
    for n in range(N):
        block, before, run = model.blocks[model.layout[n]], s, ran[n][..., None]
        if name in ("act", "ponder"):
            before = s + block.signal[n]
        if name == "lora":
            block = merged(block, n // 2)
        size = L
        if name == "sliced":
            number = n // (model.cfg.shared_blocks or 1)
            size = -(-model.cfg.max_len // model.cfg.options["groups"]) if number % 2 == 0 else L
            before = s + block.between[number - 1](s) if number else s
        shown = ran[n] if name in ("mod", "mor-expert", "mor-token", "mor-moe", "dr") else everyone
        others = entered.setdefault(model.layout[n], before) if "sharing" in name else None
        after = apply(block, before, shown, others, size)
        if name == "mod" and n % 2:
            after = s + policy.routers[str(n)](s) * (after - s)
        if name.startswith("mor") and n in policy.inside:
            recursion, place = divmod(n - policy.inside.start, policy.cycle)
            if place == 0 and ("token" not in name or recursion == 0):
                start = s
            if "token" in name and n == policy.inside[-1]:
                g = policy.router(start).softmax(-1).max(-1, keepdim=True).values
                s = start + g * torch.where(run, after, s)
                continue
            if "token" not in name and place == policy.cycle - 1:
                after = start + 0.1 * policy.routers[recursion](start).sigmoid() * after
        s = torch.where(run, after, s)
        if name == "act":
            goes_on = ran[n + 1] if n + 1 < N else torch.zeros_like(ran[n])
            h = torch.where(goes_on, policy.halt(s)[..., 0].sigmoid(), 1 - mass) * ran[n]
            mean, mass = mean + h[..., None] * s, mass + h
    return model.head(model.norm(mean if name == "act" else s))


def gradients(model, logits, x):
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_packed_execution_is_the_equations_written_out(make, name, norm, sampling):
    model, x = make(name, norm=norm), tokens()
    out = model(x, sampling=sampling)
    expected = reference(model, x, out.actions[:, 0] >= FORWARD)
    assert torch.allclose(out.logits, expected, atol=1e-4)
    packed, written = gradients(model, out.logits, x), gradients(model, expected, x)
    assert packed.keys() == written.keys() and len(packed) > 10
    for parameter, gradient in packed.items():
        assert torch.allclose(gradient, written[parameter], atol=1e-4), parameter


# ---- What every model keeps ----


@pytest.mark.parametrize("name", ADAPTIVE)
@torch.no_grad()
def test_depth_differs_from_token_to_token(make, name):
    assert len(make(name)(tokens()).depth.unique()) > 1, "else these tests would see little"


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_it_is_causal_and_cached_is_uncached(make, name, norm):
    model, x = make(name, norm=norm), tokens()
    whole, cache = model(x), Cache()
    parts = [model(part, cache) for part in x.split([4, 1, 1, 3, 1, 1, 1], dim=1)]
    assert torch.equal(torch.cat([part.depth for part in parts], 1), whole.depth)
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-4)
    for t in (1, 5, 10):
        changed = model(torch.cat([x[:, :t], (x[:, t:] + 1) % V], dim=1))
        assert torch.allclose(changed.logits[:, :t], whole.logits[:, :t], atol=1e-5)
        assert torch.equal(changed.depth[:, :t], whole.depth[:, :t])
        assert not torch.allclose(changed.logits[:, t], whole.logits[:, t], atol=1e-3)


@pytest.mark.parametrize("name", ["act", "exit", "mor-token", "mor-expert-sharing", "sliced", "dr, repeats"])
def test_cached_generation_is_uncached_past_the_context(make, name):
    model, prompt = make(name), tokens(2, 5)
    made = [morlib.generate(model, prompt, 25, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_depth_is_what_hooks_on_the_blocks_count(make, name, training):
    model, seen = make(name).train(training), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].row))
    out = model(tokens())
    assert torch.equal(torch.bincount(torch.cat(seen), minlength=3), out.depth.sum(1))


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_the_cache_holds_the_keys_that_are_shown(make, name):
    model, cache = make(name), Cache()
    out = model(tokens(), cache)
    N, tokens_read = model.cfg.n_layers, out.depth.numel()
    if name in ("act", "ponder", "exit", "exit-confidence", "by-kind-sees-all"):
        assert cache.tokens() == N * tokens_read
    elif "sharing" in name:
        assert cache.tokens() == len(model.blocks) * tokens_read
    else:
        assert cache.tokens() == int(out.depth.sum())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_gradient_reaches_all_that_should_learn(make, name):
    model, x = make(name).train(), tokens(16)
    out = model(x)
    loss = F.cross_entropy(out.logits.flatten(0, 1), x.flatten())
    model.policy.objective(loss, out, x).backward()
    for parameter_name, parameter in model.named_parameters():
        if name.startswith("dr") and not parameter_name.startswith("policy."):
            assert parameter.grad is None, "a trained model keeps its weights"
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("fresh", [None, 1])
@pytest.mark.parametrize("name", SYSTEMS)
def test_operations_are_torchs(make, name, fresh, monkeypatch):
    """One row, and nothing that packing pads."""
    monkeypatch.setattr(morlib.Packing, "M", property(lambda packing: max(packing.counts)))
    model, x, cache = make(name), tokens(1), Cache()
    with torch.no_grad():
        actions = [model(x[:, :8], cache).actions] if fresh else []
        for part in x[:, 8:].split(1, 1) if fresh else [x]:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                actions.append(model(part, cache if fresh else None).actions)
            by_kind = counter.get_flop_counts()["Global"]
            attention = sum(count for op, count in by_kind.items() if "bmm" in str(op))
            mine = cost.flops(model, torch.cat(actions, -1), fresh)
            assert mine["total"] - mine["attention"] == counter.get_total_flops() - attention
            assert mine["attention"] == attention > 0


def test_training_minimises_the_objective(make):
    """Of mod's predictors, which learn from nothing else."""
    model, task = make("mod", max_len=20, vocab_size=10), texts.load_corpus("hops-8-2")
    tc = morlib.TrainConfig(epochs=1, windows=8, batch_size=8)
    training = morlib.Training(model.train(), task, tc)
    training.gradients(task.windows("train", 20, 8))
    assert all(p.grad.abs().sum() > 0 for p in model.policy.predictors.parameters())


def test_a_step_that_is_timed_minimises_the_objective_too(make):
    model = make("mod")
    before = [parameter.clone() for parameter in model.parameters()]
    assert cost.training_step(model, tokens(4, L + 1))()["seconds"] > 0
    assert all(p.grad.abs().sum() > 0 for p in model.policy.predictors.parameters())
    assert all(map(torch.equal, before, model.parameters())), "its rate is 0"


# ---- What training minimises, by its definition ----


def given_by(modules):
    """A list that fills with what modules give, in the order of their calls."""
    seen = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    return seen


def deciders(model):
    """Whatever scores, halts, or chooses an expert."""
    policy = model.policy
    own = [getattr(policy, name) for name in ("halt", "router") if hasattr(policy, name)]
    several = getattr(policy, "predictors", None) or getattr(policy, "routers", None)
    own += several.values() if isinstance(several, torch.nn.ModuleDict) else several or ()
    networks = [block.feed_forward for block in model.blocks if isinstance(block, ExpertBlock)]
    return own + [network.router for network in networks]


def entropy_by_hand(logits, chosen):
    """The mean binary cross-entropy (nats) of logits [T] and what was chosen, bool [T]."""
    losses = []
    for logit, yes in zip(logits.tolist(), chosen.tolist()):
        p = 1 / (1 + math.exp(-logit))
        losses.append(-math.log(p if yes else 1 - p))
    return sum(losses) / len(losses)


def balance_by_hand(logits, top=1):
    """n sum_i f_i P_i of logits [T, n], of which each token takes the `top` highest."""
    p = logits.softmax(-1)
    taken = p.sort(descending=True).indices[:, :top].flatten().tolist()
    n = p.shape[1]
    return n * sum(taken.count(i) / len(taken) * p[:, i].mean().item() for i in range(n))


def of_mod(policy, seen, ran):
    return sum(entropy_by_hand(guess[:, 0], ran[layer]) for guess, layer in zip(seen, (1, 3)))


def of_expert_choice(policy, seen, ran):
    asked, total = torch.ones_like(ran[0]), 0.0
    for logits, layer in zip(seen, policy.inside[:: policy.cycle]):
        total += entropy_by_hand(logits[asked, 0], ran[layer][asked])
        asked = ran[layer]
    return policy.options["weight"] * total


def of_token_choice(policy, seen, ran):
    return policy.options["weight"] * balance_by_hand(seen[0])


def of_experts(policy, seen, ran):
    each = [balance_by_hand(logits, policy.options["top"]) for logits in seen]
    return policy.options["balance"] * sum(each) / len(each)


def of_recursions_of_experts(policy, seen, ran):
    routers = [logits for logits in seen if logits.shape[1] == 1]
    experts = [logits for logits in seen if logits.shape[1] > 1]
    return of_expert_choice(policy, routers, ran) + of_experts(policy, experts, ran)


def of_act(policy, seen, ran):
    paid = []
    for halting in zip(*(logits.sigmoid().flatten().tolist() for logits in seen)):
        spent, steps = 0.0, 1
        while spent + halting[steps - 1] < 1 - policy.options["epsilon"] and steps < len(halting):
            spent += halting[steps - 1]
            steps += 1
        paid.append(steps + 1 - spent)
    return policy.options["tau"] * sum(paid) / len(paid)


EXTRA = {
    "mod": (of_mod, {}),
    "mor-expert": (of_expert_choice, dict(weight=0.7)),
    "mor-expert, two blocks": (of_expert_choice, dict(weight=0.7)),
    "mor-token": (of_token_choice, dict(weight=0.7)),
    "moe-top1": (of_experts, dict(balance=0.7)),
    "moe-top2": (of_experts, dict(balance=0.7, top=2)),
    "mor-moe": (of_recursions_of_experts, dict(balance=0.7, weight=0.3)),
    "act": (of_act, dict(tau=0.7, bias=-1.0)),
}


@pytest.mark.parametrize("name", EXTRA)
def test_the_extra_loss_of_a_system_is_its_definition(make, name):
    by_hand, options = EXTRA[name]
    model, x = make(name, options=options or None).train(), tokens(8)
    policy, seen = model.policy, given_by(deciders(model))
    out = model(x)
    expected = by_hand(policy, seen, (out.actions[:, 0] >= FORWARD).flatten(1))
    loss = policy.objective(torch.zeros(()), out, x).item()
    assert loss == pytest.approx(expected, rel=1e-4) and loss > 0.01


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("name", ["mor-token", "mor-token, two blocks", "mor-token-sharing"])
@torch.no_grad()
def test_token_choice_takes_the_likeliest_number_of_recursions(make, name, sampling):
    model = make(name)
    seen, policy = given_by([model.policy.router]), model.policy
    ran = model(tokens(8), sampling=sampling).actions[:, 0].flatten(1) >= FORWARD
    likeliest = [row.index(max(row)) for row in seen[0].tolist()]
    assert len(set(likeliest)) > 1
    assert (ran[list(policy.inside)].sum(0) == policy.cycle * (torch.tensor(likeliest) + 1)).all()


@torch.no_grad()
def test_confidence_is_the_lead_of_the_likeliest_token_over_the_second(make):
    model, x = make("exit-confidence"), tokens(8)
    states = apply(model.blocks[0], model.embed(x) + model.positions[:L], torch.ones(8, L).bool())
    leads = []
    for row in model.readout(states.flatten(0, 1)).softmax(-1).tolist():
        first, second, *_ = sorted(row, reverse=True)
        leads.append(first - second)
    step = SimpleNamespace(readout=model.readout)
    scores = model.policy.scores(states.flatten(0, 1), step)
    assert scores.exp().tolist() == pytest.approx(leads, abs=1e-6)
    left = (model(x).depth == 1).flatten().tolist()
    assert left == [lead > 0.03 for lead in leads] and len(set(left)) == 2


# ---- What public copies get wrong ----


@pytest.mark.parametrize("name", ["mod", "mor-expert"])
@torch.no_grad()
def test_a_step_of_one_token_does_not_run_everyone(make, name):
    """Top-k of a single token is that token: copies that decode by top-k run all layers for all."""
    model, x, cache = make(name), tokens(8), Cache()
    steps = [model(x[:, t : t + 1], cache).depth for t in range(L)]
    depth = torch.cat(steps, 1)
    assert torch.equal(depth, model(x).depth)
    assert (depth < model.cfg.n_layers).float().mean() > 0.1


@pytest.mark.parametrize("name", ["mor-expert", "mor-token", "mor-moe"])
def test_recursions_are_tied_attention_included(make, name):
    model, calls = make(name), []
    for number, block in enumerate(model.blocks):

        def hook(module, inputs, number=number):
            calls.append((number, id(module.qkv.weight), id(module.proj.weight)))

        block.attention.register_forward_pre_hook(hook)
    model(tokens(), sampling=True)
    assert [number for number, *_ in calls] == [0, 1, 1, 1, 2] and len(set(calls)) == 3
    names = {parameter for parameter, _ in model.named_parameters() if "attention" in parameter}
    parts = [f"{matrix}.{kind}" for matrix in ("qkv", "proj") for kind in ("weight", "bias")]
    assert names == {f"blocks.{number}.attention.{part}" for number in range(3) for part in parts}


@torch.no_grad()
def test_the_weights_of_act_add_up_to_one(make):
    """The code beside the paper interpolates, at first with `previous * 1 - weights`, without brackets."""
    model = make("act")
    model.blocks[0].forward = lambda x, *_: x - model.blocks[0].signal[0]  # states stay as they are
    model.blocks[0].signal.copy_(model.blocks[0].signal[:1].expand_as(model.blocks[0].signal).clone())
    x = tokens()
    states = model.embed(x) + model.positions[:L]
    out = model(x)
    assert torch.allclose(out.logits, model.readout(states), atol=1e-5), (
        "the mean of equal states is that state"
    )
    assert torch.allclose(out.memory["mass"], torch.ones(3 * L), atol=1e-6)
    assert (out.memory["remainder"] > 0).all() and (out.memory["remainder"] <= 1).all()


def test_act_begins_deep_and_pays_for_depth(make_model):
    model, x = make_model(routing="act", n_layers=6).train(), tokens(16)
    out = model(x)
    assert out.depth.float().mean() > 5.5
    zero = torch.zeros(())
    ponder = out.depth.float().mean() + out.memory["remainder"].mean()
    assert torch.allclose(model.policy.objective(zero, out, x), 0.01 * ponder)
    model.policy.objective(zero, out, x).backward()
    assert model.policy.halt.bias.grad < 0, "to halt sooner is cheaper"


def test_ponder_s_distribution_is_whole_and_its_divergence_the_right_way_round(make):
    """A public copy takes KL(prior || p), and lets the last step keep its own lambda."""
    model, x = make("ponder", options=dict(beta=0.7, prior=0.3)).train(), tokens(16)
    out = model(x)
    lambdas = torch.stack(out.memory["halting"]).sigmoid()
    left, p = torch.ones_like(lambdas[0]), []
    for step in lambdas:
        p.append(left * step)
        left = left * (1 - step)
    p = torch.stack([*p, left])  # [N, T]
    assert torch.allclose(p.sum(0), torch.ones_like(left)) and torch.allclose(
        log_stopping(torch.stack(out.memory["halting"])).exp(), p, atol=1e-6
    )
    prior = torch.tensor([0.7**n for n in range(5)])
    told = torch.distributions.Categorical(p.t()), torch.distributions.Categorical(prior.expand(len(left), 5))
    losses = exit_losses(out, x)
    expected = (p * losses).sum(0) + 0.7 * torch.distributions.kl_divergence(*told)
    assert torch.allclose(model.policy.objective(torch.zeros(()), out, x), expected.mean(), atol=1e-4)


@torch.no_grad()
def test_ponder_stops_as_often_as_it_says(make):
    """Over many positions and rows, the depths thrown follow the distribution."""
    model = make("ponder", max_len=200)
    model.policy.halt.weight.zero_()
    model.policy.halt.bias.fill_(-1.0)
    depth = model(tokens(40, 200)).depth
    share = [(depth == n).float().mean().item() for n in range(1, 6)]
    stop = torch.tensor(-1.0).sigmoid().item()
    expected = [stop * (1 - stop) ** n for n in range(4)] + [(1 - stop) ** 4]
    assert share == pytest.approx(expected, abs=0.03)


def test_exits_are_read_where_they_are_and_the_oracle_picks_the_cheapest_best(make):
    model, x = make("exit", options=dict(cost=0.02)).train(), tokens(4)
    out = model(x)
    assert (out.depth == 4).all(), "training runs everybody"
    with torch.no_grad():
        s, targets, losses = model.embed(x) + model.positions[:L], x.flatten(), []
        chi = []
        for n, block in enumerate(model.blocks):
            s = apply(block, s, torch.ones(4, L, dtype=torch.bool))
            logits = model.head(model.norm(s)).flatten(0, 1)
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            if n < 3:
                chi.append(model.policy.halt[n](s).sigmoid().flatten())
        expected = torch.stack(losses).mean()
        for t in range(4 * L):
            cost = [losses[n][t] + 0.02 * n for n in range(4)]
            best = cost.index(min(cost))
            q = math.prod(1 - chi[n][t] for n in range(best)) * (chi[best][t] if best < 3 else 1)
            expected -= math.log(q) / (4 * L)
    assert torch.allclose(model.policy.objective(torch.zeros(()), out, x), expected, atol=1e-4)


@pytest.mark.parametrize("name, home", [("exit", field.exits), ("ponder", field.ponder)])
def test_halting_is_learnt_in_float32_where_the_rest_is_not(make, monkeypatch, name, home):
    model, x, kinds = make(name).train(), tokens(4), []
    monkeypatch.setattr(home, "log_stopping", lambda z: kinds.append(z.dtype) or log_stopping(z))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        loss = model.policy.objective(torch.zeros(()), out, x)
    assert out.logits.dtype == torch.bfloat16 and kinds == [torch.float32] and loss.isfinite()


@pytest.mark.parametrize("name", ["exit", "exit-confidence"])
@torch.no_grad()
def test_only_inference_sets_the_threshold_of_an_exit(make, name):
    model = make(name, target_depth=2.5)
    before = model.policy.threshold.clone()
    model.train()(tokens(16))
    assert torch.equal(model.policy.threshold, before), "a pass of training, here without gradients"
    morlib.calibrate(model, tokens(16))
    assert not torch.equal(model.policy.threshold, before)


@pytest.mark.parametrize("name", ["exit", "exit-confidence"])
@pytest.mark.parametrize("target", [1.5, 2.5, 3.5])
@torch.no_grad()
def test_a_target_depth_is_nearly_held(make, name, target):
    model = make(name, target_depth=target)
    morlib.calibrate(model, tokens(64))
    assert model(tokens(64, seed=2)).depth.float().mean().item() == pytest.approx(target, abs=0.2)


@pytest.mark.parametrize("target", [1.3, 2.0, 3.6])
@torch.no_grad()
def test_confidence_finds_its_depth_where_most_leads_are_tiny(make, target):
    """As on a task with much that nobody can predict: nearly all leads then lie within 0.01 of zero."""
    model = make("exit-confidence", target_depth=target)
    model.head.weight.mul_(0.02)
    model.head.bias.zero_()
    morlib.calibrate(model, tokens(64))
    assert model(tokens(64, seed=2)).depth.float().mean().item() == pytest.approx(target, abs=0.1)
    leads = torch.cat(model(tokens(64), calibrate=True, sampling=False).memory["highest"]).exp()
    assert leads.median() < 0.01


@torch.no_grad()
def test_training_runs_the_capacities(make):
    out = make("mod")(tokens(), sampling=True)
    assert (out.depth.sum(1) == 12 * 2 + 5 * 2).all() and (out.actions[1::2, 0].sum(-1) == 5).all()
    out = make("mor-expert")(tokens(), sampling=True)
    assert [out.actions[n, 0].sum(-1).tolist() for n in range(5)] == [[n] * 3 for n in (12, 12, 8, 4, 12)]
    ran = out.actions[1:4, 0] >= FORWARD
    assert (ran[1:] <= ran[:-1]).all(), "only those that ran a recursion may run the next"


def test_the_predictor_of_mod_changes_nothing_else(make):
    model, x = make("mod").train(), tokens(8)
    out = model(x)
    model.policy.objective(torch.zeros(()), out, x).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {
        f"policy.{name}" for name, _ in model.policy.named_parameters() if "predictors" in name
    }
    guess, run = out.memory["guesses"][0]
    agreed = torch.cat([(g > 0) == r for g, r in out.memory["guesses"]]).float().mean().item()
    assert model.policy.agreement(model.eval(), x) == pytest.approx(agreed) and 0 < agreed < 1
    one = make("mod", n_layers=1)
    assert math.isnan(one.policy.agreement(one, x)), "no layer is routed"


@torch.no_grad()
def test_lora_of_full_rank_is_the_model_that_it_begins_with_and_a_lower_one_is_nearest(make_model):
    fixed, x = make_model(n_layers=4, routing="none"), tokens()
    expected, away = fixed(x).logits, []
    for rank in (16, 8, 1):
        model = make_model(seed=1, n_layers=4, routing="lora", shared_blocks=2, options=dict(rank=rank))
        model.policy.adopt(model, fixed.state_dict())
        away.append((model(x).logits - expected).abs().max().item())
    assert away[0] < 1e-4 < away[1] < away[2]
    shared = (fixed.blocks[0].attention.proj.weight + fixed.blocks[2].attention.proj.weight) / 2
    assert torch.allclose(model.blocks[0].attention.proj.weight, shared)
    with pytest.raises(ValueError, match="a fixed model of 4 layers of width 16, not with this one"):
        model.policy.adopt(model, make_model(routing="none").state_dict())
    for other in (dict(d_ff=24), dict(d_model=8), dict(routing="moe", shared_blocks=4)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="not with this one"):
            model.policy.adopt(model, make_model(**dict(n_layers=4, routing="none") | other).state_dict())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def with_a_short_search(spec):
    return replace(spec, config=replace(spec.config, options=dict(rounds=8)))


@pytest.fixture
def routed(make):
    """A model of Dr.LLM that repeats, tokens, and the states with which it begins."""
    model, x = make("dr, repeats"), tokens(8)
    return model, x, (model.embed(x) + model.positions[:L]).view(8 * L, -1).detach()


def test_a_path_of_dr_is_what_the_model_runs(routed):
    model, x, start = routed
    out = model(x)
    path = out.actions[:, 0].flatten(1).long()
    assert set(path.unique().tolist()) == {0, 1, 2} and torch.equal(out.depth, path.sum(0).view(8, L))
    before = start.clone()
    assert torch.allclose(model.readout(through(model, start, path, x.shape)[-1]).view(8, L, V), out.logits)
    assert torch.equal(start, before), "paths that are tried begin with the same states"


@pytest.mark.parametrize("cost", [0.0, 0.02, 100.0])
def test_no_line_costs_more_by_the_path_that_dr_finds(routed, cost):
    model, x, start = routed
    model.policy.options |= dict(cost=cost, rounds=200)
    own, plain = model(x).actions[:, 0].flatten(1).long(), torch.ones(4, 8 * L, dtype=torch.long)
    found = model.policy.search(model, start, x, own)
    prices = [model.policy.price(model, start, x, path) for path in (found, own, plain)]
    assert (prices[0] < torch.minimum(*prices[1:])).all()
    losses = F.cross_entropy(model(x).logits.transpose(1, 2), x, reduction="none").sum(1)
    assert torch.allclose(prices[1], losses + cost * own.sum(0).view(8, L).sum(1), atol=1e-3)
    if cost == 100:
        assert found.float().mean() < 0.2, "nothing is worth as much"


@pytest.mark.parametrize("by_router", [False, True])
def test_dr_tries_one_action_at_one_layer_of_a_line(by_router):
    path, keen = torch.ones(4, 8 * L, dtype=torch.long), torch.rand(4, 8 * L, 3)
    after = changed(path, (8, L), keen if by_router else None).view(4, 8, L)
    assert path.eq(1).all() and after.ne(1).any()
    for line in range(8):
        layers, places = after[:, line].ne(1).nonzero().unbind(1)
        assert len(set(layers.tolist())) <= 1 and len(places) <= L / 2
        if by_router and len(places):
            layer, action = layers[0], after[layers[0], line, places[0]]
            keenest = keen.view(4, 8, L, 3)[layer, line, :, action].topk(len(places)).indices
            assert set(keenest.tolist()) == set(places.tolist())


def test_dr_learns_by_a_focal_loss_in_which_rare_actions_weigh_more(make):
    policy = make("dr").policy
    policy.options |= dict(beta=0.999)
    logits, actions = torch.randn(50, 3), torch.tensor([1] * 45 + [0] * 5)
    each, weights = [], []
    for row, action in zip(logits.tolist(), actions.tolist()):
        p = math.exp(row[action]) / sum(map(math.exp, row))
        weights.append(0.001 / (1 - 0.999 ** (5 if action == 0 else 45)))
        each.append(-((1 - p) ** 2) * math.log(p))
    expected = sum(w * e for w, e in zip(weights, each)) / sum(weights)
    assert policy.focal(logits, actions).item() == pytest.approx(expected, rel=1e-4)
    assert weights[-1] > 8 * weights[0]


def test_dr_is_added_to_the_trained_model_and_leaves_it_as_it_is(smoke, monkeypatch, make_model):
    monkeypatch.setattr(texts.Hops, "floors", {"2": {"heldout": dict(loss=3.0)}})
    spec = with_a_short_search(*field.field_runs(smoke, ["dr"]))
    fixed = field.field_runs(smoke, ["fixed-deep"])[0]
    assert spec.parent == fixed and spec.train.windows < fixed.train.windows
    (model, record, _), (begun, before, _) = runs.trained_model(spec), runs.trained_model(fixed)
    assert record["parent"] == before["id"]
    kept = model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in begun.state_dict().items())
    torch.manual_seed(spec.train.seed)
    fresh = morlib.Transformer(model.cfg).state_dict()
    routers = [name for name in kept if name.startswith("policy.")]
    assert routers and not any(torch.equal(kept[name], fresh[name]) for name in routers), "they learnt"
    for other in (dict(n_layers=3), dict(n_layers=4, d_model=8, d_ff=16)):
        with pytest.raises(ValueError, match="dr begins with a fixed model of its own width and 4 layers"):
            model.policy.adopt(model, make_model(routing="none", **other).state_dict())


def test_a_search_that_runs_out_of_memory_leaves_dr_in_training(routed, monkeypatch):
    model, x, _ = routed
    task, tc = texts.load_corpus("hops-8-2"), morlib.TrainConfig(epochs=1, windows=8, batch_size=8)
    model = morlib.Transformer(replace(model.cfg, vocab_size=task.vocab_size, max_len=20))
    training, price, calls = morlib.Training(model.train(), task, tc), model.policy.price, []

    def short_of_memory(*args):
        calls.append(len(args[2]))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("none left")
        return price(*args)

    monkeypatch.setattr(model.policy, "price", short_of_memory)
    training.gradients(task.windows("train", 20, 8))
    assert training.micro == 4 and calls[:2] == [8, 4] and model.training
    assert all(p.grad.abs().sum() > 0 for p in model.policy.parameters())


# ---- Set up, trained, found and read ----


@pytest.mark.parametrize("changes, message", [
    (dict(routing="act", options=dict(tua=1.0)), "options of act are tau, epsilon, bias, not tua"),
    (dict(routing="act", options=dict(tau="much")), "option tau must be float, not str 'much'"),
    (dict(routing="mod", options=dict(k=1)), "options of mod are none, not k"),
    (dict(routing="mor", options=dict(k=1)), "options of mor are none, not k"),
    (dict(routing="act", granularity="sample"), "needs granularity token"),
    (dict(routing="mor-token", n_layers=3), "needs n_layers of 2 more"),
    (dict(routing="moe", options=dict(top=3)), "top in 1..4 that divides d_ff"),
    (dict(routing="dr", dropout=0.1), "routing dr needs dropout 0, not 0.1"),
    (dict(routing="dr", options=dict(beta=1.0)), r"routing dr needs a beta in \[0, 1\), not 1.0"),
    (dict(routing="dr", options=dict(beta=-1.0)), r"routing dr needs a beta in \[0, 1\), not -1.0"),
    (dict(routing="exit-confidence", vocab_size=1), "needs a vocab_size of 2 or more, not 1"),
    (dict(routing="exit", n_layers=4, target_depth=0.5), r"target_depth in 1\.\.4, or None, not 0\.5"),
    (dict(routing="sliced", options=dict(groups=0)), rf"option groups must be in 1\.\.{L}, not 0"),
    (dict(routing="sliced", options=dict(groups=L + 1)), rf"option groups must be in 1\.\.{L}, not {L + 1}"),
    (dict(routing="moe", max_recursions=1, options=dict(top=0)), r"needs top in 1\.\.4 that divides d_ff"),
    (dict(routing="ponder", max_recursions=1, options=dict(prior=1.0)), r"needs a prior in \(0, 1\) and two"),
    (dict(routing="exit", max_recursions=1, n_layers=1), "needs two layers or more"),
    (dict(routing="lora", max_recursions=1, options=dict(rank=-1)), "option rank must be 1 or more, not -1"),
    (dict(routing="by-kind-sees-all", max_recursions=1, granularity="sample", target_depth=2.0),
     "needs granularity token"),
    (dict(routing="worth-above-5", max_recursions=1, target_depth=2.0), "routing worth-above-5 needs"),
])  # fmt: skip
def test_a_wrong_setting_is_explained(make_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_no_score_stands_on_the_threshold_of_an_exit(make):
    model = make("exit-confidence", target_depth=2.0)
    with torch.no_grad():
        scores = torch.cat(model(tokens(16), calibrate=True, sampling=False).memory["highest"])
    assert (scores - model.policy.threshold).abs().min() > 5e-6


@pytest.mark.parametrize("mean, N", [(2.3, 4), (6.0, 12)])
def test_ponder_s_prior_has_the_mean_that_is_asked_for(make, mean, N):
    model = make("ponder", n_layers=N, options=dict(prior=field.ponder.prior_of_mean(mean, N)))
    shares = model.policy.log_prior(torch.device("cpu")).exp()
    assert float(shares @ torch.arange(1.0, N + 1)) == pytest.approx(mean, abs=0.02)
    with pytest.raises(ValueError, match=f"cut at {N} steps has no mean of {N}"):
        field.ponder.prior_of_mean(N, N)


def test_options_are_part_of_a_run_s_identity_and_their_absence_is_not():
    cfg, tc, task = morlib.ModelConfig(9), morlib.TrainConfig(), texts.load_corpus("hops-8-2")
    assert "options" not in runs.records.identifying(cfg)
    changed = [morlib.ModelConfig(9, routing="act", options=dict(tau=tau)) for tau in (0.1, 0.2)]
    assert len({runs.run_id(one, tc, task) for one in (cfg, *changed)}) == 3


@pytest.fixture
def smoke(monkeypatch):
    return runs.settings(dict(preset="smoke"))


LABELS = [
    "act", "blind", "dr", "exit", "exit-confidence", "fixed-between", "fixed-deep", "fixed-half", "frozen",
    "lora", "lora-uptrained", "mod", "moe-top1", "moe-top2", "mor", "mor-expert",
    "mor-expert-cycle", "mor-expert-sharing", "mor-moe", "mor-token", "mor-token-cycle",
    "mor-token-sharing", "planted", "ponder", "sliced", "worth",
]  # fmt: skip


def test_the_rows_have_names(smoke):
    assert sorted(field.field_models(smoke)) == LABELS
    with pytest.raises(ValueError, match="no system magic: choose among fixed-half, "):
        field.field_runs(smoke, ["magic"])


@pytest.mark.parametrize("label", LABELS)
def test_each_row_is_trained_found_loaded_and_generates(smoke, tmp_path, monkeypatch, label):
    monkeypatch.setattr(texts.Hops, "floors", {"2": {"heldout": dict(loss=3.0)}})  # they take seconds
    (spec,) = field.field_runs(smoke, [label])
    spec = replace(spec, train=replace(spec.train, heldout_windows=100, eval_windows=50))
    spec = with_a_short_search(spec) if label == "dr" else spec
    record = runs.run(spec)
    assert record["model"] == label and record["experiment"] == "field"
    assert math.isfinite(record["metrics"]["loss"]) and 0 < record["metrics"]["effective_depth"]
    assert record["history"][-1]["val_loss"] < record["history"][0]["val_loss"] + 0.05
    model, again, task = runs.trained_model(spec)
    assert again["id"] == record["id"], "found, not trained again"
    loss = morlib.evaluate(model, task, "heldout", spec.train.heldout_windows)["loss"]
    assert loss == pytest.approx(record["metrics"]["loss"], abs=1e-6)
    texts.save_model(model, task.tokenizer, tmp_path / "row.safetensors")
    loaded, tokenizer = texts.load_model(tmp_path / "row.safetensors")
    written = [texts.write(each, tokenizer, "abc", 20, temperature=0) for each in (model, loaded)]
    assert written[0] == written[1] and len(written[0]) >= 20


@pytest.mark.parametrize("listed", [field.field_runs, field.text_runs])
def test_lora_uptrained_begins_with_the_fixed_model_of_as_many_layers(smoke, listed):
    half, lora, spec = listed(smoke, ["fixed-half", "lora", "lora-uptrained"])
    assert spec.parent == half and half.config.n_layers == spec.config.n_layers
    assert spec.config == lora.config and lora.parent == ""
    assert spec.train.windows == round(half.train.windows / 2)


def test_lora_uptrained_begins_near_the_loss_of_the_model_it_adopts(smoke, monkeypatch):
    monkeypatch.setattr(texts.Hops, "floors", {"2": {"heldout": dict(loss=3.0)}})
    half, spec = field.field_runs(smoke, ["fixed-half", "lora-uptrained"])
    still = replace(spec, train=replace(spec.train, lr=1e-9, router_lr=1e-9))
    before, after = runs.run(half), runs.run(still)
    assert after["parent"] == before["id"] != after["id"]
    assert after["metrics"]["loss"] == pytest.approx(before["metrics"]["loss"], abs=0.2), "rank 8 of 16"


def test_a_task_takes_no_tokenizer():
    with pytest.raises(ValueError, match="hops-8-6 is a task: it takes no tokenizer"):
        texts.load_corpus("hops-8-6", tokenizer="char")


def test_experiments_of_a_single_layer_can_be_set_up():
    s = runs.settings(dict(preset="smoke", n_layers=1))
    layers = runs.exp2_models(s, 1.0)["fixed-shallow"][0]["n_layers"]
    assert layers == runs.bangla_models(s, 1.0, 1.0)["fixed-shallow"][0]["n_layers"] == 1


def test_numbers_of_numpy_among_options_are_python_s(make_model):
    """Else a run of them could not be written down."""
    model = make_model(routing="act", options=dict(tau=np.float32(0.5)))
    assert type(model.cfg.options["tau"]) is float and json.dumps(model.cfg.options) == '{"tau": 0.5}'
    with pytest.raises(ValueError, match="must be float, not bool True"):
        make_model(routing="act", options=dict(tau=True))
