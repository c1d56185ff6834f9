"""A curve that grows while a model trains."""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
from IPython.display import display

from morlib import Training


class LiveCurve:
    """A hook for `morlib.train(..., after_step=)` and `runs.run(..., hook=)`: loss and E, drawn in the cell.

    every: seconds between two drawings.
    """

    def __init__(self, every: float = 3.0):
        self.every, self.drawn = every, -every
        self.points: list[tuple[int, float, float]] = []  # step, loss (nats a token) and E of its batch
        self.figure, self.axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
        plt.close(self.figure)  # it is displayed here, not at the end of the cell
        self.shown = display(self.figure, display_id=True)

    def __call__(self, training: Training) -> None:
        last = training.step == training.steps
        if not last and time.monotonic() - self.drawn < self.every:
            return
        self.points.append((training.step, float(training.loss), float(training.depth)))
        steps, losses, depths = zip(*self.points)
        labels = ("training loss (nats a token)", "effective depth E")
        for ax, values, label in zip(self.axes, (losses, depths), labels):
            ax.clear()
            ax.plot(steps, values, marker=".", label="training batch")
            ax.set(xlabel="training step", ylabel=label, xlim=(0, training.steps))
        if training.history:
            measured = [(point["step"], point["val_loss"]) for point in training.history]
            self.axes[0].plot(*zip(*measured), marker="s", label="validation text")
            self.axes[0].legend()
        if self.shown:
            self.shown.update(self.figure)
        self.drawn = time.monotonic()
