"""Cards that are not here: what is chosen for them and why, float16 with a scaler, and memory that runs out."""

import dataclasses

import nbformat
import pytest
import torch
from test_runs import config, strip, trained
from test_survival import TINY

import morlib


@pytest.fixture
def card(monkeypatch):
    """Let torch believe in a card: its name, its capability, whether it has bfloat16, and how its first operation ends."""

    def put(name, capability, bf16, error=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
        ones = torch.ones

        def first_operation(*shape, device=None, **more):
            if error:
                raise error
            return ones(*shape, **more)

        monkeypatch.setattr(torch, "ones", first_operation)
        morlib.pick_device.cache_clear()
        return morlib.pick_device()

    yield put
    monkeypatch.undo()
    morlib.pick_device.cache_clear()


NO_KERNEL = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously reported")


def test_a_card_that_torch_cannot_drive_leads_to_the_cpu_and_the_line_that_helps(card):
    device, dtype, why = card("Tesla P100-PCIE-16GB", (6, 0), False, NO_KERNEL)
    assert (device.type, dtype) == ("cpu", torch.float32)
    assert why.startswith(f"CPU, float32: this build of torch ({torch.__version__}) cannot drive the Tesla P100-PCIE-16GB (sm_60) (CUDA error: no kernel image is")
    assert why.endswith('To use the card: pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126') and "\n" not in why


def test_a_card_newer_than_the_build_needs_a_newer_build(card):
    assert card("GeForce RTX 5090", (12, 0), True, NO_KERNEL)[2].endswith("To use the card: pip install --upgrade torch")


def test_a_card_whose_memory_is_full_says_so(card):
    device, _, why = card("Tesla T4", (7, 5), False, torch.OutOfMemoryError("CUDA out of memory"))
    assert device.type == "cpu" and "the memory of the Tesla T4 (sm_75) is full" in why and "pip" not in why


@pytest.mark.parametrize("name, capability, bf16, dtype, reason", [
    ("Tesla P100-PCIE-16GB", (6, 0), False, torch.float32, "P100-PCIE-16GB, float32: the Tesla P100-PCIE-16GB (sm_60) has neither"),
    ("Tesla V100", (7, 0), False, torch.float16, "float16 autocast with a gradient scaler"),
    ("Tesla T4", (7, 5), False, torch.float16, "Tesla T4, float16 autocast with a gradient scaler: the Tesla T4 (sm_75) has float16 units, but none for bfloat16."),
    ("NVIDIA A100", (8, 0), True, torch.bfloat16, "bfloat16 autocast: the NVIDIA A100 (sm_80) has bfloat16 units."),
    ("NVIDIA H100", (9, 0), True, torch.bfloat16, "bfloat16 autocast"),
])  # fmt: skip
def test_each_card_gets_what_it_has_units_for(card, name, capability, bf16, dtype, reason):
    device, chosen, why = card(name, capability, bf16)
    assert device.type == "cuda" and chosen == dtype and reason in why


def test_each_notebook_prints_the_device_and_why():
    for path in sorted((morlib.ROOT / "notebooks").glob("*.ipynb")):
        code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert any("print(morlib.pick_device()[2])" in cell.source for cell in code[:3]), path.name


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_trains_and_goes_on_where_it_was(corpus, monkeypatch, tmp_path, dtype):
    """The T4's float16 and its gradient scaler, and the Ampere's bfloat16, on the CPU's own half precision."""
    monkeypatch.setattr(morlib, "pick_device", lambda: (torch.device("cpu"), dtype, "half: for the test"))
    _, expected = trained(corpus, TINY, routing="mor", target_depth=2.0)
    losses = [point["train_loss"] for point in expected["history"]]
    assert losses[-1] < losses[0]
    monkeypatch.setattr(morlib, "CHECKPOINT_SECONDS", 0.0)
    path, gradients, calls = tmp_path / "x.partial", morlib._gradients, []
    torch.manual_seed(0)

    def interrupted(*args):
        calls.append(args[4].get_scale())
        if len(calls) == 9:
            raise KeyboardInterrupt
        return gradients(*args)

    monkeypatch.setattr(morlib, "_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        morlib.train(morlib.build_model(config(corpus, routing="mor", target_depth=2.0)), corpus, TINY, checkpoint=path)
    record = morlib.train(morlib.build_model(config(corpus, routing="mor", target_depth=2.0)), corpus, TINY, checkpoint=path)
    assert strip(record) == strip(expected)
    assert (calls[0] > 1) == (dtype == torch.float16), "float16 alone needs its loss scaled"


@pytest.mark.parametrize("routing", ("none", "mor"))
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(corpus, monkeypatch, capsys, routing):
    training = dataclasses.replace(TINY, epochs=1)
    _, whole = trained(corpus, training, routing=routing, dropout=0.0)
    forward, sizes = morlib.Transformer.forward, []

    def small_card(self, tokens, *args, **more):
        if self.training:
            sizes.append(len(tokens))
            if len(tokens) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(morlib.Transformer, "forward", small_card)
    _, record = trained(corpus, training, routing=routing, dropout=0.0)
    assert sizes[:6] == [8, 4, 2, 2, 2, 2] and set(sizes[6:]) == {2}
    said = capsys.readouterr().out
    assert "out of memory at step 1: the micro-batch is now 4 windows; the effective batch stays 8" in said and "is now 2 windows" in said
    assert record["history"][-1]["step"] == whole["history"][-1]["step"], "as many steps of the same batch"
    if routing == "none":  # a router draws its noise a part at a time
        assert record["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], abs=1e-4)
        assert record["metrics"]["train_applications"] == whole["metrics"]["train_applications"]


def test_evaluation_takes_what_fits(make_model, monkeypatch):
    model, windows = make_model(routing="none"), torch.randint(11, (21, 9), generator=torch.Generator().manual_seed(0))
    whole, forward = morlib.score(model, windows), morlib.Transformer.forward

    def small_card(self, tokens, *args, **more):
        if len(tokens) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(morlib.Transformer, "forward", small_card)
    parts = morlib.score(model, windows)
    assert all(torch.allclose(whole[k], parts[k], atol=1e-5) for k in whole)


def test_a_model_that_does_not_fit_at_all_says_so(corpus, monkeypatch):
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(morlib, "_gradients", no_room)
    with pytest.raises(torch.OutOfMemoryError, match="with a single window of 12 tokens: take a smaller model or max_len, or the CPU"):
        trained(corpus, TINY, routing="none")
