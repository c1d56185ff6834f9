"""Shared by all tests: one thread, outputs in a scratch folder, small models, small texts."""

import matplotlib.pyplot as plt
import pytest
import torch

import morlib
from suite import results, texts

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture
def moved():
    """Records in which a model's accuracy is so many points higher."""

    def moved(records, model, points):
        return records.assign(accuracy=records["accuracy"] + points * (records["model"] == model))

    return moved


@pytest.fixture(scope="session")
def goals():
    """The goals of all settings of hops as the stored records reach them; to be read alone."""
    return results.known_goals(results.known_settings())


@pytest.fixture
def make_model():
    """A small model in eval mode; weights from a fixed seed unless another is given."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        shape = dict(vocab_size=11, n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.0)
        return morlib.Transformer(morlib.ModelConfig(**(shape | changes))).eval()

    return make


@pytest.fixture
def small_text(tmp_path):
    """A path to 4,000 characters with some structure."""
    path = tmp_path / "small.txt"
    lines = [f"line {i % 17} of {i * i % 23}: the quick brown fox.\n" for i in range(110)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def corpus(small_text):
    return texts.load_corpus(small_text)


@pytest.fixture
def quick_training():
    return morlib.TrainConfig(epochs=2, windows=32, batch_size=8, lr=3e-3, evaluations=2, eval_windows=4)
