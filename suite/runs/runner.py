"""Runs: each is found, taken up again or trained; many go side by side, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path

import filelock
import joblib
import pandas as pd
import safetensors.torch
import torch
from tqdm.auto import tqdm

import morlib
from morlib import ModelConfig, Training, Transformer

from ..files import REFERENCE, outputs, safe_name, sha256, unwritable, write_whole
from ..texts import load_corpus, save_model
from .checkpoint import Checkpoint
from .device import claim_card, keep_memory, pick_device, quiet
from .experiments import Run
from .records import LATER, read_record, record_of, run_id, table_of
from .settings import PRESETS

Hook = Callable[[Training], bool | None]
ATTEMPTS = 3  # a run whose worker dies goes on from its checkpoint so many times


# ---- One run ----


def run(spec: Run, progress: bool = False, hook: Hook | None = None, folder: Path | None = None,
        card: int | None = None, checkpoint_seconds: float = 60.0) -> dict:  # fmt: skip
    """The record of a run: found by its identity, else trained, and then stored with its weights.

    A run that was killed goes on from its checkpoint; one that another process is at is waited for.
    hook: is given the training after each step, and stops it early by returning True. The record then says
    `stopped_at`, and is not taken for that of the whole run.
    folder: where outputs go. card: the number of the card to train on.
    """
    if isinstance(spec.parent, Run):
        spec = replace(spec, parent=run(spec.parent, progress, None, folder, card)["id"])
    corpus = load_corpus(**dict(spec.corpus))
    cfg = replace(spec.config, vocab_size=corpus.vocab_size)
    files = Files(spec, cfg, corpus, folder or outputs())
    if files.record.is_file() and (record := files.finished()):
        return record | spec.labels()
    files.check_writable()
    with claim(files.lock, str(spec)):
        record = files.finished()  # by another process meanwhile, or under another experiment's name
        if record is None:
            files.tidy()
            device = pick_device(spec.device, card)
            training, kept = trained(spec, cfg, corpus, files, device, progress, hook, checkpoint_seconds)
            record = record_of(training, kept.where, kept.best, spec.preset)
            if training.step < training.steps:
                record["stopped_at"] = training.step
                files.rename(f"{files.id}-stopped-at-{training.step}")
            if spec.parent:
                record["parent"] = spec.parent
            notes = {"run": str(spec), "id": files.id}
            save_model(training.model, corpus.tokenizer, files.weights, notes)
            record["weights"] = tensors_digest(training.model.state_dict())
        record = record | spec.labels() | {"id": files.id}
        write_whole(files.record, json.dumps(record, indent=1).encode())
        files.partial.unlink(missing_ok=True)
    return record


class Files:
    """Where the record, the weights and the checkpoint of a run are."""

    def __init__(self, spec: Run, cfg: ModelConfig, corpus, folder: Path):
        self.results, self.checkpoints = folder / "results", folder / "checkpoints"
        # The identity behind it keeps runs apart whose names become one
        self.name = f"{safe_name(f'{spec.experiment}_{spec.model}')}_s{spec.train.seed}"
        self.rename(run_id(cfg, spec.train, corpus, spec.code, spec.parent, spec.preset))
        self.lock = self.checkpoints / f"{self.id}.lock"

    def rename(self, id: str) -> None:
        self.id = id
        self.record = self.results / f"{self.name}_{id}.json"
        self.weights = self.checkpoints / f"{id}.safetensors"
        self.partial = self.checkpoints / f"{id}.partial"

    def finished(self) -> dict | None:
        """The record of this very run, under whatever name, if its weights are there too."""
        found = sorted(self.results.glob(f"*_{self.id}.json"), key=lambda path: path != self.record)
        return read_record(found[0]) if found and self.weights.is_file() else None

    def check_writable(self) -> None:
        """Learn before the training that nothing can be stored. Raises OSError that names the folder."""
        for target in (self.record, self.weights):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=target.parent).close()
            except OSError as error:
                raise unwritable(target, error) from error

    def tidy(self) -> None:
        """Remove what a writer that was killed has left; for the holder of the lock."""
        for part in (*self.results.glob(f".*{self.id}*.part"), *self.checkpoints.glob(f".{self.id}*.part")):
            part.unlink(missing_ok=True)


def trained(spec: Run, cfg: ModelConfig, corpus, files: Files, device: tuple, progress: bool, hook,
            seconds: float) -> tuple[Training, Checkpoint]:  # fmt: skip
    """Train a run, from its checkpoint if there is one. Returns both: a checkpoint knows where it ran."""
    keep_memory()
    device, dtype, why = device
    cpu, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    where = f"{why.split(':')[0]}, {cpu}, threads {threads}"
    checkpoint = Checkpoint(files.partial, files.id, where, seconds)
    torch.manual_seed(spec.train.seed)
    model = Transformer(cfg).to(device)
    if spec.parent:
        begin_with(model, files.checkpoints / f"{spec.parent}.safetensors")

    def after_step(training: Training) -> bool:
        checkpoint.after_step(training)
        return bool(hook and hook(training))

    with checkpoint.finishing_steps():
        training = morlib.train(model, corpus, spec.train, progress and not quiet(), dtype,
                                checkpoint.resume, after_step)  # fmt: skip
    if checkpoint.interrupted:
        raise KeyboardInterrupt("stopped after the last step; run it again to go on from what was kept")
    return training, checkpoint


def begin_with(model: Transformer, path: Path) -> None:
    """Put a parent's weights into a model; a policy that can `adopt` those of another kind of model does."""
    if path.is_file() and hasattr(model.policy, "adopt"):
        state = safetensors.torch.load_file(path)
        if state.keys() != model.state_dict().keys():
            device = next(model.parameters()).device
            return model.policy.adopt(model, {name: tensor.to(device) for name, tensor in state.items()})
    return load_weights(model, path)


def load_weights(model: Transformer, path: Path, digest: str | None = None) -> None:
    """Put a finished run's weights into a model. Raises ValueError if they are not there or not its own."""
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: do that run first, or put its file back")
    try:
        state = safetensors.torch.load_file(path)
        whole = digest is None or tensors_digest(state) == digest
    except safetensors.SafetensorError:
        whole = False
    if not whole:
        advice = "delete it, and the run is done again"
        raise ValueError(f"{path.name} does not hold the weights of its run (SHA-256 differs): {advice}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        other = " ".join(str(error).split())
        raise ValueError(f"{path.name} holds weights of another configuration ({other})") from None


def go_on(spec: Run, **changes) -> Run:
    """A new run that begins with the weights of a finished one; changes are fields of TrainConfig.

    `go_on(run, epochs=12, lr=1e-3)`: its record names the parent, which is trained first if need be.
    """
    train, label = replace(spec.train, **changes), f"{spec.model}, continued"
    return replace(spec, model=label, train=train, parent=spec)


def tensors_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights, whatever else their file says of itself."""
    return sha256(safetensors.torch.save({k: v.cpu().contiguous().clone() for k, v in state.items()}))


@contextlib.contextmanager
def claim(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that the system frees when its holder dies; wait, and say so, while another holds it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"note: {what} is being trained by another process: waiting for it, or to take over if it dies")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def trained_model(spec: Run) -> tuple[Transformer, dict, object]:
    """The model of a finished run with its record and corpus; it is trained first if it is not finished.

    Raises ValueError under the preset `stored`.
    """
    if spec.preset == "stored":
        raise ValueError("weights do not ship: choose a preset that trains, for instance quick")
    record, corpus = run(spec), load_corpus(**dict(spec.corpus))
    model = Transformer(replace(spec.config, vocab_size=corpus.vocab_size))
    load_weights(model, outputs() / "checkpoints" / f"{record['id']}.safetensors", record.get("weights"))
    model.vocabulary = corpus.vocabulary
    return model.to(pick_device(spec.device)[0]).eval(), record, corpus


# ---- Records that ship ----


def stored_key(model: dict, train: dict, data: tuple, parent: str) -> tuple:
    """What a stored record and a run have in common without the text: both configurations, its name, and the
    id of the run that it goes on from, if any."""

    def frozen(value):
        if isinstance(value, dict):
            return tuple(sorted(value.items()))
        return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value

    fields = {k: frozen(v) for k, v in {**LATER, **model, **train}.items() if k != "vocab_size"}
    return *sorted(fields.items()), data, parent


def stored(specs: list[Run], folder: Path = REFERENCE) -> list[dict | str]:
    """For each run the record that ships, or in words that there is none."""
    known = {}
    for path in sorted(folder.glob("*_s*_*.json")):
        record = read_record(path)
        if "stopped_at" in record:  # it is not that of the whole run
            continue
        data = record["data"]
        pieces = data["vocab_size"] if data["tokenizer"] == "sentencepiece" else 0
        cut = PRESETS.get(record["preset"], {}).get("max_chars")
        key = (data["name"].removesuffix("-wikipedia"), data["split"], pieces, cut)
        config, parent = record["config"], record.get("parent", "")
        known[stored_key(config["model"], config["train"], key, parent)] = record
    results = []
    for spec in specs:
        text = dict(spec.corpus)
        usual = "sentencepiece" if text["name"] == "bangla" else "char"
        pieces = text["subwords"] if (text.get("tokenizer") or usual) == "sentencepiece" else 0
        parent = spec.parent
        if isinstance(parent, Run):
            (before,) = stored([parent], folder)
            parent = before["id"] if isinstance(before, dict) else before  # in words: no record has this one
        data = text["name"], text["split"], pieces, text.get("max_chars")
        record = known.get(stored_key(vars(spec.config), vars(spec.train), data, parent))
        missing = "no record of it ships: choose a preset that trains it"
        names = dict(experiment=spec.experiment, model=spec.model)
        results.append(missing if record is None else record | names)
    return results


# ---- Many runs ----


def attempt(spec: Run, progress: bool = False) -> dict | str:
    """A run's record, or its error as text, so that one failing run leaves the others alone."""
    if spec.preset == "stored":
        return stored([spec])[0]
    try:
        return run(spec, progress)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def attempt_in_worker(spec: Run, folder: str, number: int, policies: dict[str, type]) -> dict | str:
    """`attempt` in a process of one thread and one card, which knows the policies that a user registered."""
    morlib.POLICIES.update(policies)
    torch.set_num_threads(1)
    try:
        with claim_card(number, torch.cuda.device_count()) as card:
            return run(spec, folder=Path(folder), card=card)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_all(specs: list[Run], jobs: int = 1, scheduler: str | None = None) -> pd.DataFrame:
    """Run many, `jobs` at a time, with a progress bar. Returns the records of those that finished as a table.

    Each job is a process of one thread. With the address of a Dask scheduler (or MORLIB_SCHEDULER) its
    workers do the runs; they need morlib, the texts, and the outputs folder under the same path. Finished
    runs are found, not repeated. Those that fail are printed with their error, and the others go on. Runs of
    the preset "stored" are looked up among the records that ship.
    Raises RuntimeError if all fail.
    """
    scheduler = scheduler or os.environ.get("MORLIB_SCHEDULER")
    if specs and all(spec.preset == "stored" for spec in specs):
        results = stored(specs)
    else:
        with tqdm(total=len(specs), desc="runs", disable=quiet()) as bar:
            done = {}
            for index, result in results_of(specs, jobs, scheduler):
                done[index] = result
                bar.update()
        results = [done[index] for index in range(len(specs))]
    tell_failures(specs, results)
    return table_of([result for result in results if not isinstance(result, str)])


def tell_failures(specs: list[Run], results: list[dict | str]) -> None:
    """Print which runs failed and why. Raises RuntimeError if all did."""
    failed = [f"{spec}: {result}" for spec, result in zip(specs, results) if isinstance(result, str)]
    if not failed:
        return
    kept = "those that finished are stored, and the failed ones are tried again next time:"
    message = "\n  ".join([f"{len(failed)} of {len(specs)} runs failed; {kept}", *failed])
    print(message)
    if len(failed) == len(specs):
        raise RuntimeError(message)


def results_of(specs: list[Run], jobs: int, scheduler: str | None) -> Iterator[tuple[int, dict | str]]:
    """Index and result of each run, as they finish."""
    if jobs == 1 and not scheduler:
        for index, spec in enumerate(specs):
            yield index, attempt(spec, progress=True)
        return
    # The longest first, so that no worker waits for one long run at the end
    left = sorted(range(len(specs)), key=lambda i: -specs[i].train.epochs * specs[i].config.n_layers)
    with cluster(scheduler):
        for _ in range(ATTEMPTS):  # a worker that dies ends joblib's local pool
            try:
                for index, result in in_workers(specs, list(left), None if scheduler else jobs):
                    left.remove(index)
                    yield index, result
                return
            except BrokenExecutor as error:
                print(f"note: a worker died ({type(error).__name__}); {len(left)} runs are taken up again")
    for index in left:
        yield index, f"its worker died {ATTEMPTS} times: is there enough memory? try fewer jobs"


def in_workers(specs: list[Run], order: list[int], jobs: int | None) -> Iterator[tuple[int, dict | str]]:
    """Index and result of runs in worker processes, in the given order."""
    folder = str(outputs().resolve())
    own = {name: policy for name, policy in morlib.POLICIES.items() if policy.__module__ != "morlib"}
    many = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=1, pre_dispatch="all")
    tasks = (joblib.delayed(attempt_in_worker)(specs[i], folder, n, own) for n, i in enumerate(order))
    return zip(order, many(tasks))


@contextlib.contextmanager
def cluster(scheduler: str | None) -> Iterator[None]:
    """Let joblib use a Dask cluster while this is open. Raises ValueError if no scheduler answers."""
    if not scheduler:
        yield
        return
    import distributed  # heavy, and needed on this path only

    try:
        client = distributed.Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        advice = "start one with `dask scheduler`, or leave the address out"
        raise ValueError(f"no Dask scheduler answers at {scheduler!r} ({error}): {advice}") from None
    with client, joblib.parallel_config("dask", client=client, n_jobs=-1):
        yield
