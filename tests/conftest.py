"""Shared by all tests: one thread, records into a scratch folder, small models."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import morlib

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path


@pytest.fixture
def make_model():
    """A small model in eval mode; weights from a fixed seed unless another is given."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        settings = dict(vocab_size=11, n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.0)
        return morlib.build_model(morlib.ModelConfig(**(settings | changes))).eval()

    return make


@pytest.fixture
def small_text(tmp_path):
    """A path to 4,000 characters with some structure."""
    path = tmp_path / "small.txt"
    path.write_text("".join(f"line {i % 17} of {i * i % 23}: the quick brown fox.\n" for i in range(110)), encoding="utf-8")
    return str(path)


@pytest.fixture
def corpus(small_text):
    return morlib.load_corpus(small_text)


@pytest.fixture
def quick_training():
    return morlib.TrainConfig(epochs=2, windows=32, batch_size=8, lr=3e-3, evaluations=2, eval_windows=4)
