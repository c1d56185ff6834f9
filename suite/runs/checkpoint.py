"""A training that survives: its state on the disk once a minute and at each point of the learning curve."""

from __future__ import annotations

import io
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from morlib import Training

from ..files import sha256, write_whole

STATEFUL = ("model", "optimizer", "scaler")
PLAIN = ("step", "seconds", "micro", "applications", "history", "losses", "depths")


def snapshot(training: Training) -> dict:
    """All that a training changes: weights, optimizer, counts, torch's generators."""
    state = {name: getattr(training, name).state_dict() for name in STATEFUL}
    state |= {name: getattr(training, name) for name in PLAIN}
    on_card = training.device.type == "cuda"  # of the card in use: the next time it may be another
    cuda = [torch.cuda.get_rng_state(training.device)] if on_card else []
    return state | dict(cpu=torch.get_rng_state(), cuda=cuda)


def restore(training: Training, state: dict) -> None:
    """Put a training to where a snapshot was taken."""
    for name in STATEFUL:
        if state[name]:  # a scaler that does nothing has no state
            getattr(training, name).load_state_dict(state[name])
    for name in PLAIN:
        setattr(training, name, state[name])
    training.losses = [loss.to(training.device) for loss in training.losses]
    training.applications = training.applications.to(training.device)
    torch.set_rng_state(state["cpu"])
    if training.device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0], training.device)


def save_state(path: Path, state: dict) -> None:
    """Write a state of tensors, numbers, text, lists and dicts whole, after a line with its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, sha256(buffer.getvalue()).encode() + b"\n" + buffer.getvalue())


def load_state(path: Path, identity: str) -> dict:
    """The state that `save_state` wrote for the run `identity`. Runs no code.

    Raises ValueError that names a file which was cut short or changed, is none of ours, or is another run's.
    """
    digest, _, data = path.read_bytes().partition(b"\n")
    try:
        if digest != sha256(data).encode():
            raise ValueError("it was cut short or changed: its SHA-256 differs")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("id") != identity:
            raise ValueError(f"it is not of run {identity}")
    except Exception as error:  # unpickling fails in many ways; any of them means: not ours
        reason = str(error).splitlines()[0]
        advice = "delete it to train this run from the start"
        raise ValueError(f"checkpoint {path.name} is refused: {reason}; {advice}") from None
    return state


class Best:
    """The point of a learning curve at which validation loss was lowest, and the weights of then.

    Points of the warm-up do not count: the model is then not the one that is asked for.
    """

    def __init__(self):
        self.point, self.weights = {}, {}

    def after_step(self, training: Training) -> None:
        point = training.history[-1] if training.history else {}
        settled = not training.full(training.step - 1)
        lower = point.get("val_loss", math.inf) < self.point.get("val_loss", math.inf)
        if point.get("step") == training.step and settled and lower:
            state = training.model.state_dict() if training.step < training.steps else {}  # else it has them
            self.point = point
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def before(self, training: Training) -> bool:
        """Whether it came before the training's last point."""
        return self.point.get("val_loss", math.inf) < training.history[-1]["val_loss"]


def forgotten(history: list[dict]) -> dict:
    """What there is of the best point of a checkpoint that was written before best points were kept."""
    return dict(point=min(history, key=lambda point: point["val_loss"], default={}), weights={})


class Checkpoint:
    """The two hooks of `morlib.train`: `resume` puts a training back, `after_step` keeps it.

    `where` says on which device the training ran, from which step on if it was taken up again. `best` is the
    training's best point so far.
    """

    def __init__(self, path: Path, identity: str, where: str, seconds: float = 60.0):
        self.path, self.identity, self.where, self.seconds = path, identity, where, seconds
        self.kept, self.interrupted, self.best = time.monotonic(), False, Best()

    def resume(self, training: Training) -> None:
        if self.path.is_file():
            state = load_state(self.path, self.identity)
            restore(training, state)
            vars(self.best).update(state.get("best") or forgotten(training.history))
            if state["where"] != self.where:
                self.where = f"{state['where']}; from step {training.step} on {self.where}"
            print(f"note: going on from step {training.step} of {training.steps} ({self.path.name})")

    def after_step(self, training: Training) -> None:
        """Keep the state if it is time. Raises KeyboardInterrupt after that if one has come meanwhile."""
        self.best.after_step(training)
        due = time.monotonic() - self.kept >= self.seconds or training.step in training.points
        if due or self.interrupted:
            training.check_finite()
            state = snapshot(training) | dict(id=self.identity, where=self.where, best=vars(self.best))
            save_state(self.path, state)
            self.kept = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt(f"stopped after step {training.step} of {training.steps}; it is kept")

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Let an interrupt (Ctrl-C, a notebook's stop button) wait until the step under way is done.

        So what is kept is a whole step, and going on from it gives the same record. A second interrupt ends
        at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
