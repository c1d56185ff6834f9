"""Seeing a model learn: a live curve, and one that is kept."""

import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd

import morlib
from suite import results
from suite.files import ROOT


def test_a_live_curve_draws_each_point_and_the_validation_loss(make_model, corpus, quick_training):
    opened = plt.get_fignums()
    curve = results.LiveCurve(every=0.0)
    model = make_model(vocab_size=corpus.vocab_size)
    training = morlib.train(model, corpus, quick_training, after_step=curve)
    steps, losses, depths = zip(*curve.points)
    assert steps == tuple(range(1, training.steps + 1))
    assert all(0 < loss < 10 for loss in losses)
    assert all(0 <= depth <= 6 for depth in depths)
    validation = curve.axes[0].lines[1].get_ydata()
    assert list(validation) == [point["val_loss"] for point in training.history]
    assert plt.get_fignums() == opened  # the cell shows it once


def test_the_readme_says_how_to_keep_a_curve(make_model, corpus, quick_training, tmp_path, monkeypatch):
    """Its own lines, with something that takes what TensorBoard's writer takes."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sent = []
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: sent.append((tag, value, step)))
    names = dict(writer=writer)
    exec("hook = " + re.search(r"`after_step=(lambda .*?)`", readme)[1], names)
    model = make_model(vocab_size=corpus.vocab_size)
    training = morlib.train(model, corpus, quick_training, after_step=names["hook"])
    assert [(tag, step) for tag, _, step in sent] == [("loss", i + 1) for i in range(training.steps)]
    exec(re.search(r"`(pandas\.[^`]*to_csv[^`]*)`", readme)[1], dict(pandas=pd, training=training))
    assert list(pd.read_csv("curve.csv")["val_loss"]) == [point["val_loss"] for point in training.history]
