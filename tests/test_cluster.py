"""Many machines: a local Dask cluster of two worker processes stands for them."""

import dataclasses
import threading

import dask
import distributed
import pytest
from test_runs import strip
from test_survival import TINY, kill_the_owner_of, spec

import morlib


@pytest.fixture
def cluster(tmp_path):
    """A client of a scheduler with two workers, which write checkpoints after every step."""
    with dask.config.set({"distributed.nanny.pre-spawn-environ": {"MORLIB_CHECKPOINT_SECONDS": "0", "OMP_NUM_THREADS": "1"}}):
        local = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path / "dask", memory_limit=None)
        with local, distributed.Client(local, set_as_default=False) as client:
            yield client


def note_trainings(log):
    """In a worker: leave a line in a file for each training that begins."""
    import morlib

    train = morlib.train

    def noted(model, corpus, training, *args, **more):
        with open(log, "a") as file:
            file.write(f"{training.epochs} {training.seed}\n")
        return train(model, corpus, training, *args, **more)

    morlib.train = noted


def test_a_cluster_does_each_run_once_and_outlives_a_killed_worker(small_text, tmp_path, cluster, monkeypatch):
    log = tmp_path / "trainings"
    cluster.run(note_trainings, str(log))
    many = [spec(small_text, dataclasses.replace(TINY, epochs=20)), *(spec(small_text, dataclasses.replace(TINY, seed=seed)) for seed in (1, 2)), spec("nowhere.txt")]
    killed = []
    threading.Thread(target=kill_the_owner_of, args=(morlib.outputs(), killed), daemon=True).start()
    monkeypatch.setenv("MORLIB_SCHEDULER", cluster.scheduler.address)
    table = morlib.run_all([*many, many[1], many[2]])
    assert killed == [table["record"][0]["id"]], "the long run was not killed: make it longer"
    assert table["seed"].tolist() == [0, 1, 2, 1, 2]
    assert len(table.attrs["failed"]) == 1 and "no text file at nowhere.txt" in table.attrs["failed"][0]
    assert len(list((morlib.outputs() / "results").glob("*.json"))) == 3
    begun = log.read_text().split("\n")
    assert begun.count("2 1") == begun.count("2 2") == 1, "a run was done twice"
    assert 1 <= begun.count("20 0") <= 2, "the killed worker's run is begun again by the other (or by a new one, which does not note it)"
    there = [strip(record) for record in table["record"]]
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "here"))
    here = [strip(morlib.run(one)) for one in many[:3]]
    assert there == [*here, *here[1:]], "the same records as on one machine, though one was finished by another worker than began it"


def test_a_scheduler_that_is_not_there_is_told(small_text, monkeypatch):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(ValueError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9'.*start one with `dask scheduler`, or leave the address out"):
            morlib.run_all([spec(small_text)], scheduler="tcp://127.0.0.1:9")
