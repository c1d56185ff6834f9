"""Many machines: a local Dask cluster of two worker processes stands for them."""

import dataclasses

import dask
import distributed
import pytest
from test_runs import strip
from test_survival import TINY, dying_once, spec

import morlib


@pytest.fixture
def scheduler(tmp_path):
    with dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "1"}}):
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path / "dask", memory_limit=None) as cluster:
            yield cluster.scheduler_address


def test_a_cluster_does_each_run_once_and_outlives_a_killed_worker(small_text, tmp_path, scheduler, monkeypatch):
    many = [*(spec(small_text, dataclasses.replace(TINY, epochs=epochs, seed=seed)) for epochs, seed in ((3, 0), (2, 1), (2, 2))), spec("nowhere.txt")]
    monkeypatch.setattr(morlib, "_attempt", dying_once(tmp_path / "died", 3))
    monkeypatch.setenv("MORLIB_SCHEDULER", scheduler)
    trainings = tmp_path / "died.begun"
    table = morlib.run_all([*many, many[1], many[2]])
    assert (tmp_path / "died").exists() and trainings.read_text().split("\n").count("3 0") == 2, "the run of the killed worker was taken over"
    assert table["seed"].tolist() == [0, 1, 2, 1, 2]
    assert len(table.attrs["failed"]) == 1 and "no text file at nowhere.txt" in table.attrs["failed"][0]
    assert len(list((morlib.outputs() / "results").glob("*.json"))) == 3
    assert table["record"][1] == table["record"][3] and table["record"][2] == table["record"][4], "the same record, its clock too: it was trained once"
    monkeypatch.undo()
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "here"))
    here = [strip(morlib.run(one)) for one in many[:3]]
    assert [strip(record) for record in table["record"]] == [*here, *here[1:]], "the same records as on one machine, though one was finished by another than began it"


def test_a_scheduler_that_is_not_there_is_told(small_text):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(ValueError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9'.*start one with `dask scheduler`, or leave the address out"):
            morlib.run_all([spec(small_text)], scheduler="tcp://127.0.0.1:9")
