"""A model as a graph of fixed shapes: the same logits and depths, routing inside."""

import pytest
import torch

import morlib
import suite.field  # noqa: F401  registers act and others
import suite.runs  # noqa: F401  registers by-kind
from suite.cost.export import Masked, export

SHAPES = [
    dict(routing="none"),
    dict(routing="mor"),
    dict(routing="mor", target_depth=2.0),
    dict(routing="mor", target_depth=2.0, max_recursions=1, shared_blocks=1),
    dict(routing="mor", norm="post", max_recursions=3),
    dict(routing="random", target_depth=2.0),
    dict(routing="worth", target_depth=2.0, max_recursions=1),
    dict(routing="by-kind", target_depth=2.0, max_recursions=1),
]


def tokens(B, L):
    return torch.randint(11, (B, L), generator=torch.Generator().manual_seed(B + L))


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_execution_is_the_model(make_model, shape):
    model = make_model(**shape)
    morlib.calibrate(model, tokens(8, 12))
    x = tokens(3, 9)
    out = model(x)
    logits, depth = Masked(model)(x)
    assert torch.equal(depth, out.depth)
    assert torch.allclose(logits, out.logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_is_the_model_at_other_batches_and_lengths(make_model, tmp_path):
    model = make_model(routing="mor", target_depth=2.0)
    morlib.calibrate(model, tokens(8, 12))
    export(model, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for B, L in ((1, 12), (4, 5)):
        logits, depth = program(tokens(B, L))
        out = model(tokens(B, L))
        assert torch.equal(depth, out.depth)
        assert torch.allclose(logits, out.logits, atol=1e-5)
        assert 0 < depth.double().mean() < 3  # its routing is inside


def test_a_model_on_a_card_is_exported_on_tokens_that_lie_there(make_model, monkeypatch):
    """`meta` stands in for the card."""
    seen = []

    def stop(masked, args, **how):
        seen.append(args[0].device.type)
        raise RuntimeError("stopped here")

    monkeypatch.setattr(torch.export, "export", stop)
    with pytest.raises(RuntimeError, match="stopped here"):
        export(make_model(routing="none").to("meta"))
    assert seen == ["meta"]


def test_a_router_of_prefix_means_is_not_exported(make_model):
    with pytest.raises(ValueError, match="granularity"):
        Masked(make_model(granularity="sample"))


@pytest.mark.parametrize("routing", ["act", "exit-confidence", "sliced"])
def test_a_system_with_blocks_or_states_of_its_own_is_not_exported(make_model, routing):
    with pytest.raises(ValueError, match=f"routing {routing} has blocks or states of its own"):
        export(make_model(routing=routing, max_recursions=1))


def test_an_export_that_would_differ_is_refused(make_model, monkeypatch):
    model = make_model(routing="mor")
    whole = Masked.full_step
    monkeypatch.setattr(Masked, "full_step", lambda self, block, x, runs: whole(self, block, x, runs | True))
    with pytest.raises(ValueError, match="differs"):
        export(model)
