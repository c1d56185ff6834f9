"""Cards that are not here: what is chosen for them and why, float16 with a scaler, memory that runs out."""

import dataclasses
import weakref

import nbformat
import pytest
import torch
from test_runs import new_model, strip
from test_survival import TINY, spec

import morlib
from suite import cost, files, runs
from suite.cost import bench, systems
from suite.runs import device as devices
from suite.runs import records, runner


@pytest.fixture
def card(monkeypatch):
    """Let torch believe in a card.

    Its name, its capability, whether it has bfloat16, and how its first operation ends.
    """

    def put(name, capability, bf16, error=None, cards=1, **asked):
        def supported(including_emulation=True):
            return bf16 or including_emulation

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        ones = torch.ones

        def first_operation(*shape, device=None, **more):
            if error:
                raise error
            return ones(*shape, **more)

        monkeypatch.setattr(torch, "ones", first_operation)
        return runs.pick_device(**asked)

    return put


NO_KERNEL = RuntimeError(
    "CUDA error: no kernel image is available for execution on the device\n"
    "CUDA kernel errors might be asynchronously reported"
)


def test_a_card_that_cannot_even_be_asked_for_its_name_leads_to_the_cpu(card, monkeypatch):
    card("Tesla T4", (7, 5), False)

    def busy(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_name", busy)
    device, dtype, why = runs.pick_device()
    assert (device.type, dtype) == ("cpu", torch.float32) and "busy or unavailable" in why


def test_a_card_whose_lock_is_another_users_is_passed_over(monkeypatch):
    def of_another(self, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(devices.filelock.FileLock, "acquire", of_another)
    with devices.claim_card(3, 2) as card:
        assert card == 1, "shared, as where all are taken"


def test_a_card_that_torch_cannot_drive_leads_to_the_cpu_and_the_line_that_helps(card):
    device, dtype, why = card("Tesla P100-PCIE-16GB", (6, 0), False, NO_KERNEL)
    assert (device.type, dtype) == ("cpu", torch.float32)
    cannot = f"this build of torch ({torch.__version__}) cannot drive the Tesla P100-PCIE-16GB (sm_60)"
    assert why.startswith(f"CPU, float32: {cannot} (CUDA error: no kernel image is")
    line = 'pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126'
    assert why.endswith(f"To use the card: {line}") and "\n" not in why


def test_a_card_newer_than_the_build_needs_a_newer_build(card):
    why = card("GeForce RTX 5090", (12, 0), True, NO_KERNEL)[2]
    assert why.endswith("To use the card: pip install --upgrade torch")


def test_a_card_whose_memory_is_full_says_so(card):
    device, _, why = card("Tesla T4", (7, 5), False, torch.OutOfMemoryError("CUDA out of memory"))
    assert device.type == "cpu" and "the memory of the Tesla T4 (sm_75) is full" in why and "pip" not in why


P100 = "P100-PCIE-16GB, float32: the Tesla P100-PCIE-16GB (sm_60) has neither"
T4 = "Tesla T4, float16 autocast with a gradient scaler: the Tesla T4 (sm_75) has float16 units, but none for"


@pytest.mark.parametrize("name, capability, bf16, dtype, reason", [
    ("Tesla P100-PCIE-16GB", (6, 0), False, torch.float32, P100),
    ("Tesla V100", (7, 0), False, torch.float16, "float16 autocast with a gradient scaler"),
    ("Tesla T4", (7, 5), False, torch.float16, T4),
    ("NVIDIA A100", (8, 0), True, torch.bfloat16, "the NVIDIA A100 (sm_80) has bfloat16 units."),
    ("NVIDIA H100", (9, 0), True, torch.bfloat16, "bfloat16 autocast"),
])  # fmt: skip
def test_each_card_gets_what_it_has_units_for(card, name, capability, bf16, dtype, reason):
    device, chosen, why = card(name, capability, bf16)
    assert device.type == "cuda" and chosen == dtype and reason in why


# ---- A device that is asked for ----


@pytest.mark.parametrize(
    "wanted, found", [(None, "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_device_can_be_asked_for(card, monkeypatch, wanted, found):
    assert str(card("Tesla T4", (7, 5), False, cards=2, wanted=wanted)[0]) == found
    monkeypatch.setenv("MORLIB_DEVICE", "cpu")
    assert str(runs.pick_device(wanted)[0]) == (found if wanted else "cpu"), "what is written comes first"
    assert str(runs.pick_device(wanted, card=1)[0]) == {"cuda": "cuda:1"}.get(
        wanted, found if wanted else "cpu"
    )


@pytest.mark.parametrize("wanted, message", [
    ("gpu", "device must be cpu, cuda, cuda:NUMBER or mps, not 'gpu'"),
    ("cuda:two", "device must be cpu, cuda, cuda:NUMBER or mps"),
    ("cuda:7", r"device cuda:7 was asked for and cannot be used .*there are 2 GPUs, no number 7"),
])  # fmt: skip
def test_a_device_that_is_none_is_refused(card, wanted, message):
    with pytest.raises(ValueError, match=message):
        card("Tesla T4", (7, 5), False, cards=2, wanted=wanted)


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runs.pick_device()[0].type == "cpu"
    with pytest.raises(
        ValueError, match="cuda was asked for and cannot be used .*no GPU.*: choose cpu or None"
    ):
        runs.pick_device("cuda")
    with pytest.raises(
        ValueError, match="mps was asked for, but torch sees no Apple GPU: choose cpu or None"
    ):
        runs.pick_device("mps")
    with pytest.raises(ValueError, match="cuda was asked for"):
        runs.settings(dict(preset="smoke", device="cuda"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device, dtype, why = runs.pick_device("mps")
    assert (device.type, dtype) == ("mps", torch.float32) and "may differ in the last bits" in why


def test_the_device_of_the_parameters_reaches_the_run(small_text, monkeypatch):
    s = runs.settings(dict(preset="smoke", device="cpu", seeds=1))
    (one,) = runs.experiment_runs(s, "test", dict(name=small_text), {"fixed": (dict(routing="none"), {})})
    assert one.device == s.device == "cpu"
    asked = []

    def stop(wanted, card=None):
        asked.append(wanted)
        raise ValueError("stopped here")

    monkeypatch.setattr(runner, "pick_device", stop)
    with pytest.raises(ValueError, match="stopped here"):
        runs.run(one)
    assert asked == ["cpu"]


def test_what_the_cpu_did_does_not_bear_the_name_of_a_card(card, monkeypatch, tmp_path):
    card("Tesla T4", (7, 5), False)
    assert cost.machine()["gpu"] == "Tesla T4" and systems.here().startswith("Tesla T4, ")
    measured = cost.Measured(runs.settings(dict(preset="smoke", device="cpu")))
    assert cost.machine("cpu")["gpu"] is measured.record["gpu"] is None
    assert "Tesla" not in systems.here("cpu") and measured.record["device"].startswith("CPU")
    assert bench.record_path(tmp_path).stem == "speed_tesla-t4"
    assert bench.record_path(tmp_path, "growth").stem.startswith("growth_cpu-")
    monkeypatch.setenv("MORLIB_DEVICE", "cpu")
    assert cost.machine()["gpu"] is None and bench.record_path(tmp_path).stem.startswith("speed_cpu-")


def test_stored_records_need_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MORLIB_PRESET", "stored")
    monkeypatch.setenv("MORLIB_DEVICE", "cuda")
    assert runs.settings({}).stored and runs.settings(dict(device="cuda")).stored
    monkeypatch.setenv("MORLIB_PRESET", "auto")
    with pytest.raises(ValueError, match="cuda was asked for and cannot be used"):
        runs.settings({})


def test_each_notebook_prints_the_device_and_why():
    for path in sorted((files.ROOT / "notebooks").glob("*.ipynb"))[1:]:  # the first trains nothing
        code = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert any("runs.pick_device(s.device)" in source for source in code[:5]), path.name


# ---- Half precision ----


def on_cpu(monkeypatch, dtype):
    monkeypatch.setattr(runner, "pick_device", lambda *a: (torch.device("cpu"), dtype, "half: for the test"))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_trains_and_goes_on_where_it_was(small_text, monkeypatch, tmp_path, dtype):
    """The float16 of a T4 with its gradient scaler, and bfloat16, on the CPU itself."""
    on_cpu(monkeypatch, dtype)
    one = spec(small_text, dataclasses.replace(TINY, epochs=1))  # 8 steps
    scales, gradients = [], morlib.Training.gradients
    expected = runs.run(one)
    losses = [point["train_loss"] for point in expected["history"]]
    assert losses[-1] < losses[0]
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "again"))

    def interrupted(training, batch):
        scales.append(training.scaler.get_scale())
        if len(scales) == 5:
            raise RuntimeError("stopped here")
        return gradients(training, batch)

    monkeypatch.setattr(morlib.Training, "gradients", interrupted)
    with pytest.raises(RuntimeError, match="stopped here"):
        runs.run(one, checkpoint_seconds=0.0)
    assert strip(runs.run(one)) == strip(expected)
    assert len(scales) == 5 + 4
    assert (scales[0] > 1) == (dtype == torch.float16), "float16 alone needs its loss scaled"


# ---- Memory that runs out ----


@pytest.mark.parametrize("routing", ("none", "mor"))
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(
    corpus, monkeypatch, capsys, routing
):
    training = dataclasses.replace(TINY, epochs=1)

    def record():
        model = new_model(corpus, routing=routing, dropout=0.0)
        return records.record_of(morlib.train(model, corpus, training), "here")

    whole = record()
    forward, sizes = morlib.Transformer.forward, []

    def small_card(self, tokens, *args, **more):
        if self.training:
            sizes.append(len(tokens))
            if len(tokens) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(morlib.Transformer, "forward", small_card)
    parts = record()
    assert sizes[:6] == [8, 4, 2, 2, 2, 2] and set(sizes[6:]) == {2}
    said = capsys.readouterr().out
    assert "out of memory at step 1: the micro-batch is now 4 windows; the effective batch stays 8" in said
    assert "is now 2 windows" in said
    last = [done["history"][-1]["step"] for done in (whole, parts)]
    assert last[0] == last[1], "as many steps of the same batch"
    if routing == "none":  # a router draws its noise a part at a time
        assert parts["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], abs=1e-4)
        assert parts["metrics"]["train_applications"] == whole["metrics"]["train_applications"]


def test_evaluation_takes_what_fits(make_model, monkeypatch):
    windows = torch.randint(11, (21, 9), generator=torch.Generator().manual_seed(0))
    model = make_model(routing="none")
    whole, forward = morlib.score(model, windows), morlib.Transformer.forward

    def small_card(self, tokens, *args, **more):
        if len(tokens) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(morlib.Transformer, "forward", small_card)
    parts = morlib.score(model, windows)
    assert all(torch.allclose(whole[k], parts[k], atol=1e-5) for k in whole)


def test_a_budget_is_set_by_what_fits(make_model, monkeypatch):
    model, forward = make_model(routing="mor", target_depth=2.0, max_recursions=1), morlib.Transformer.forward
    tokens, sizes = torch.randint(11, (64, 9), generator=torch.Generator().manual_seed(0)), []

    def small_card(self, tokens, *args, **more):
        sizes.append(len(tokens))
        if len(tokens) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(morlib.Transformer, "forward", small_card)
    morlib.calibrate(model.train(), tokens)
    assert sizes[:3] == [64, 32, 16] and model.training
    assert model.eval()(tokens[:16]).depth.float().mean() == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("doing", ["gradients", "score"])
def test_a_try_that_did_not_fit_is_let_go_before_the_next(corpus, monkeypatch, doing):
    """Memory runs out after the model's pass, twice: its output, and so its graph, must be gone by then."""
    model, made, held, forward = new_model(corpus, dropout=0.0), [], [], morlib.Transformer.forward
    windows = corpus.windows("train", model.cfg.max_len, 8)
    training = morlib.Training(model, corpus, TINY)

    def watched(self, tokens, *args, **more):
        held.append(sum(ref() is not None for ref in made))
        out = forward(self, tokens, *args, **more)
        made.append(weakref.ref(out))
        return out

    def no_room(call):
        def tried(*args, **more):
            if len(made) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(*args, **more)

        return tried

    monkeypatch.setattr(morlib.Transformer, "forward", watched)
    if doing == "gradients":
        monkeypatch.setattr(torch.Tensor, "backward", no_room(torch.Tensor.backward))
        training.gradients(windows)
    else:
        categorical = torch.distributions.Categorical
        monkeypatch.setattr(torch.distributions, "Categorical", no_room(categorical))
        morlib.score(model, windows, batch_size=8)
    assert len(held) >= 3 and held[:3] == [0, 0, 0]


def test_a_model_that_does_not_fit_at_all_says_so(corpus, monkeypatch):
    forward = morlib.Transformer.forward

    def no_room(self, *args, **more):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **more)

    monkeypatch.setattr(morlib.Transformer, "forward", no_room)
    advice = "with a single window: take a smaller model or max_len, or the CPU"
    with pytest.raises(torch.OutOfMemoryError, match=advice):
        morlib.train(new_model(corpus, routing="none"), corpus, TINY)
