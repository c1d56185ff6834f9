"""A reader's own text: in the notebooks' parameters, and in the README's lines."""

import json
import re
from pathlib import Path

import pytest
import torch

import morlib
from suite import files, runs, texts

README = (files.ROOT / "README.md").read_text(encoding="utf-8")


def blocks():
    """The README's Python blocks, in order."""
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("several", [False, True])
def test_a_text_given_as_a_parameter_is_what_runs(small_text, tmp_path, several):
    names = [small_text]
    if several:
        (tmp_path / "more.txt").write_text("another text of the same reader\n" * 40, encoding="utf-8")
        names.append(str(tmp_path / "more.txt"))
    s = runs.settings(dict(preset="smoke", text=names if several else small_text, epochs=1), runs.OWN_TEXT)
    models = {"fixed": (dict(routing="none", n_layers=1), {})}
    for experiment in ("exp1", "exp2"):
        chosen = runs.text_of(s, experiment)
        record = runs.run(runs.experiment_runs(s, experiment, chosen, models)[0])
        corpus = texts.load_corpus(names, split=chosen["split"], max_chars=s.max_chars)
        assert record["data"]["name"] == corpus.name == ("small+1" if several else "small")
        assert record["data"]["sha256"] == corpus.sha256


def test_a_text_may_be_read_in_pieces(small_text):
    given = dict(preset="smoke", text=small_text, tokenizer="sentencepiece", subwords=300)
    s = runs.settings(given, runs.OWN_TEXT)
    corpus = texts.load_corpus(**runs.text_of(s, "exp1"), subwords=s.subwords)
    assert corpus.tokenizer.kind == "sentencepiece"


def test_a_text_given_by_a_relative_path_is_found_from_any_folder(small_text, monkeypatch):
    monkeypatch.chdir(Path(small_text).parent)
    s = runs.settings(dict(preset="smoke", text=Path(small_text).name), runs.OWN_TEXT)
    assert s.text == [str(Path(small_text))] and runs.text_of(s, "exp1")["name"] == s.text[0]
    assert runs.settings(dict(preset="smoke", text=["*.md", "bangla"]), runs.OWN_TEXT).text == [
        "*.md",
        "bangla",
    ]


def test_without_a_text_the_experiments_read_their_own():
    s = runs.settings(dict(preset="smoke"), runs.OWN_TEXT)
    assert {name: runs.text_of(s, name) for name in runs.TEXTS} == runs.TEXTS


def test_where_a_text_would_be_ignored_it_is_refused(small_text):
    with pytest.raises(ValueError, match="unknown parameter text"):
        runs.settings(dict(preset="smoke", text=small_text))


@pytest.mark.parametrize("number", ["02", "03", "05"])
def test_these_notebooks_take_a_text(number):
    path = next((files.ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    cells = [
        ("".join(cell["source"]), cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    parameters = next(source for source, cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    assert "\ntext: str = None" in parameters
    assert any("runs.OWN_TEXT" in source for source, _ in cells)


def test_the_lines_of_the_readme_run(small_text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text((tmp_path / "small.txt").read_text(encoding="utf-8") + "The end\n" * 9)
    lines = next(block for block in blocks() if "save_model" in block)
    smaller = lines.replace("d_model=64", "d_model=16").replace("windows=800", "windows=16")
    assert smaller.count("=16") > lines.count("=16")
    here, there = smaller.replace("progress=True", "progress=False").split("model, tokenizer =")
    exec(here, {})
    assert (tmp_path / "my.safetensors").is_file()
    capsys.readouterr()
    exec("from suite import texts\nmodel, tokenizer =" + there, {})  # nothing is left of the training
    assert capsys.readouterr().out.startswith("The ")


def test_the_policy_of_the_readme_routes(make_model, monkeypatch):
    names = dict(torch=torch, morlib=morlib)
    exec(next(block for block in blocks() if "EarlyExit" in block), names)
    monkeypatch.setitem(morlib.POLICIES, "early-exit", morlib.POLICIES.pop("early-exit"))
    model = make_model(routing="early-exit", max_recursions=1)
    torch.nn.init.zeros_(model.policy.score.bias)
    out = model(torch.randint(11, (4, 12)))
    ran = out.actions[:, 0] == morlib.FORWARD
    assert 0 < ran.float().mean() < 1
    assert (ran[1:] <= ran[:-1]).all()  # a token that has stopped stays stopped
    prompt = torch.randint(11, (8, 9))
    uncached = morlib.generate(model, prompt, 20, use_cache=False)
    assert torch.equal(morlib.generate(model, prompt, 20), uncached)
