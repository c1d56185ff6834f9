"""Many machines: a local Dask cluster of two worker processes stands for them."""

import dataclasses

import dask
import distributed
import pytest
from test_runs import SHORT, strip
from test_survival import TINY, dying_once, spec

import morlib
from suite import files, runs
from suite.runs import runner


@pytest.fixture
def scheduler(tmp_path):
    with dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "1"}}):
        with distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=tmp_path / "dask",
            memory_limit=None,
        ) as cluster:
            yield cluster.scheduler_address


class Sparse(morlib.Policy):
    """A policy of the user's own."""

    def forward(self, step):
        return morlib.Decision((step.position % 2 < 1).long())


def test_a_cluster_does_each_run_once_and_outlives_a_killed_worker(
    small_text, tmp_path, scheduler, monkeypatch, capsys
):
    sizes = (3, 0), (2, 1), (2, 2)
    many = [spec(small_text, dataclasses.replace(TINY, epochs=e, seed=seed)) for e, seed in sizes]
    many.append(spec("nowhere.txt"))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "attempt_in_worker", dying_once(tmp_path / "died", 3))
        patch.setenv("MORLIB_SCHEDULER", scheduler)
        table = runs.run_all([*many, many[1], many[2]])
        begun = (tmp_path / "died.begun").read_text().split("\n")
        assert (tmp_path / "died").exists() and begun.count("3 0") == 2, "the killed worker's was taken over"
    assert table["seed"].tolist() == [0, 1, 2, 1, 2]
    said = capsys.readouterr().out
    assert "1 of 6 runs failed" in said and "no text file at nowhere.txt" in said
    assert len(list((files.outputs() / "results").glob("*.json"))) == 3
    records = table["record"]
    assert records[1] == records[3] and records[2] == records[4], "the clock too: it was trained once"
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "here"))
    here = [strip(runs.run(one)) for one in many[:3]]
    assert [strip(record) for record in records] == [*here, *here[1:]], "the same as on one machine"
    monkeypatch.setitem(morlib.POLICIES, "sparse", Sparse)
    own = spec(small_text, SHORT, routing="sparse", target_depth=None, max_recursions=1)
    assert runs.run_all([own], scheduler=scheduler)["effective_depth"].tolist() == [1.5]
    assert runs.run(own)["id"] == runs.run_all([own])["record"][0]["id"]


def test_a_scheduler_that_is_not_there_is_told(small_text):
    message = r"no Dask scheduler answers at 'tcp://127.0.0.1:9'.*start one with `dask scheduler`, or leave"
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(ValueError, match=message):
            runs.run_all([spec(small_text)], scheduler="tcp://127.0.0.1:9")
