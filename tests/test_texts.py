"""A model is saved with its tokenizer, and goes on with a text: here and in another process alike."""

import importlib
import json
import os
import pickle
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

import morlib
from suite import files, texts

SHAPE = dict(n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.0, routing="mor")
SENTENCE = "the quick brown fox of ঢাকা jumps.\n"
WRITE_AGAIN = """
import json, sys
from suite import texts
loaded = [texts.load_model(path) for path in sys.argv[1:]]
print(json.dumps([texts.write(*one, "the fox", 60, seed=3) for one in loaded]))
"""


def new_model(tokenizer, **changes):
    torch.manual_seed(1)
    return morlib.Transformer(morlib.ModelConfig(tokenizer.vocab_size, **(SHAPE | changes))).eval()


TOKENIZERS = {
    "char": lambda: texts.CharTokenizer(SENTENCE),
    "sentencepiece": lambda: texts.SubwordTokenizer(SENTENCE * 30, 290),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def letters():
    return texts.CharTokenizer("abcdefgh")


def python(*arguments):
    environment = os.environ | dict(PYTHONPATH=str(files.ROOT), PYTHONIOENCODING="utf-8")
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True)


# ---- Saving and loading ----


def test_another_process_goes_on_word_for_word(tmp_path):
    written = {}
    for kind, make in TOKENIZERS.items():
        model = new_model(tokenizer := make(), target_depth=2.5)
        path = tmp_path / "new folder" / f"{kind}.safetensors"
        texts.save_model(model, tokenizer, path, dict(author="me"))
        written[path] = texts.write(model, tokenizer, "the fox", 60, seed=3)
        assert written[path].startswith("the fox") and len(written[path]) > 20
        assert morlib.load_model(path)[1]["author"] == "me"
    done = python("-c", WRITE_AGAIN, *written)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == list(written.values())


def test_a_tokenizer_comes_back_as_it_was(tokenizer):
    again = type(tokenizer).from_text(tokenizer.to_text())
    assert again.identity == tokenizer.identity and len(again.identity) == 12
    assert again.encode(SENTENCE) == tokenizer.encode(SENTENCE)
    assert again.decode(again.encode(SENTENCE)) == SENTENCE


def test_an_identity_tells_vocabularies_apart():
    first = texts.CharTokenizer("abc")
    assert first.identity == texts.CharTokenizer("cbacba").identity != texts.CharTokenizer("abd").identity


def test_pieces_learnt_twice_are_the_same():
    first = texts.SubwordTokenizer(SENTENCE * 30, 290)
    next((files.outputs() / "tokenizers").iterdir()).unlink()
    assert texts.SubwordTokenizer(SENTENCE * 30, 290).identity == first.identity


def test_model_and_tokenizer_must_fit(letters, tmp_path):
    model = new_model(texts.CharTokenizer("abc"))
    for use in (
        lambda: texts.save_model(model, letters, tmp_path / "model"),
        lambda: texts.write(model, letters, "abc"),
    ):
        with pytest.raises(ValueError, match="the model has 3 tokens, the tokenizer 8"):
            use()
    with pytest.raises(ValueError, match="the note 'tokenizer' is the tokenizer's"):
        texts.save_model(new_model(letters), letters, tmp_path / "model", dict(tokenizer="mine"))


@pytest.mark.parametrize(
    "notes, message",
    [
        (dict(tokenizer_kind="bytes"), "has a tokenizer of the kind 'bytes'; known are char, sentencepiece"),
        (
            dict(tokenizer='["b", "a"]'),
            "cannot be used .the characters of a vocabulary must be a sorted list",
        ),
        (dict(tokenizer="[1, 2]"), "cannot be used .the characters of a vocabulary"),
        (dict(tokenizer="not JSON"), "has a tokenizer that cannot be used"),
        (dict(tokenizer='["a", "b"]'), "the model has 8 tokens, the tokenizer 2"),
        (dict(tokenizer_kind="sentencepiece"), "the pieces are not in base64"),
        (dict(tokenizer_kind="sentencepiece", tokenizer="AAAA"), "has a tokenizer that cannot be used"),
        (dict(tokenizer_kind="sentencepiece", tokenizer=""), "has a tokenizer that cannot be used"),
    ],
)
def test_a_damaged_tokenizer_is_explained(letters, tmp_path, notes, message):
    path = tmp_path / "odd.safetensors"
    whole = dict(tokenizer_kind="char", tokenizer=letters.to_text())
    morlib.save_model(new_model(letters), path, whole | notes)
    with pytest.raises(ValueError, match=f"odd.safetensors .*{message}"):
        texts.load_model(path)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_a_cut_or_foreign_file_is_refused_and_runs_no_code(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    texts.save_model(new_model(letters), letters, path)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], data[:5], b"", b"no model " * 50, pickle.dumps(Trap())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is not a model that can be loaded"):
            texts.load_model(path)
    with pytest.raises(ValueError, match="no model file at"):
        texts.load_model(tmp_path / "nothing")
    assert not (tmp_path / "trapped").exists()


def test_the_file_is_read_by_others_too(letters, tmp_path):
    """The tokenizer lies in the notes: characters as JSON."""
    path = tmp_path / "model.safetensors"
    texts.save_model(new_model(letters), letters, path)
    notes = morlib.load_model(path)[1]
    assert json.loads(notes["tokenizer"]) == list("abcdefgh") and notes["tokenizer_kind"] == "char"


# ---- Writing ----


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_writing_is_what_generate_gives(tokenizer, use_cache, temperature):
    """Past the end of the context too."""
    model = new_model(tokenizer)
    prompt = torch.tensor(tokenizer.encode("the fox"))
    generator = torch.Generator().manual_seed(5)
    expected = morlib.generate(model, prompt, 40, use_cache, temperature, generator)
    written = texts.write(model, tokenizer, "the fox", 40, temperature, 5, use_cache)
    assert written == tokenizer.decode(expected)


def test_a_seed_gives_one_text(letters):
    model = new_model(letters)
    state = torch.get_rng_state()
    written = texts.write(model, letters, "abc", 50, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone"
    torch.manual_seed(99)
    assert texts.write(model, letters, "abc", 50, seed=1) == written
    assert texts.write(model, letters, "abc", 50, seed=2) != written
    assert texts.write(model, letters, "abc", np.int64(50), seed=np.int64(1)) == written


def test_the_model_is_left_in_its_mode(letters):
    model = new_model(letters, dropout=0.5).train()
    assert texts.write(model, letters, "abc", 30) == texts.write(model.eval(), letters, "abc", 30)
    model.train()
    texts.write(model, letters, "abc", 30, stop="a")
    assert model.training


def test_the_likeliest_tokens_only(letters):
    model = new_model(letters)
    greedy = texts.write(model, letters, "abc", 40, temperature=0)
    for choice in (dict(top_k=1), dict(top_p=1e-6), dict(top_k=3, top_p=1e-6)):
        assert texts.write(model, letters, "abc", 40, temperature=2.0, **choice) == greedy
    free = texts.write(model, letters, "abc", 40, temperature=2.0)
    assert free != greedy
    for choice in (dict(top_k=8), dict(top_k=100), dict(top_p=1.0)):
        assert texts.write(model, letters, "abc", 40, temperature=2.0, **choice) == free


def test_which_tokens_are_sampled():
    from suite.texts.writing import choose

    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()

    def sampled(**choice):
        generator = torch.Generator().manual_seed(0)
        settings = dict(temperature=1.0, generator=generator, top_k=None, top_p=None) | choice
        return {choose(logits, **settings) for _ in range(300)}

    assert sampled() == {0, 1, 2, 3}
    assert sampled(top_k=2) == {1, 3} and sampled(top_k=3) == {1, 2, 3}
    assert sampled(top_p=0.39) == {1} and sampled(top_p=0.41) == {1, 3} and sampled(top_p=0.71) == {1, 2, 3}
    assert sampled(top_k=2, top_p=0.5) == {1}, "of the two likeliest, renormalized, one has 57 %"


def test_writing_ends_before_a_stop_string(letters):
    model = new_model(letters)
    whole = texts.write(model, letters, "abc", 60)
    stop = whole[20:22]
    cut = texts.write(model, letters, "abc", 60, stop=stop)
    assert cut == "abc" + whole[3:].split(stop)[0] and len(cut) < len(whole)
    assert texts.write(model, letters, "abc", 60, stop=["zz", stop]) == cut
    assert texts.write(model, letters, "abc", 60, stop="zz") == whole
    assert texts.write(model, letters, "abc", 60, stop=None) == whole


def test_a_long_prompt_keeps_its_last_part(letters, capsys):
    model = new_model(letters)
    prompt = "abcdefgh" * 3  # 24 characters; the model reads 12
    written = texts.write(model, letters, prompt, 20)
    assert written.startswith(prompt)
    assert capsys.readouterr().out == "note: the model reads the last 12 of the prompt's 24 tokens\n"
    assert written[12:] == texts.write(model, letters, prompt[12:], 20)
    assert not capsys.readouterr().out


def test_each_of_several_prompts_goes_on_alone(letters, capsys):
    model = new_model(letters)
    prompts = ["abc", "abcdefgh" * 2, "h", "abcdefgh" * 3]
    together = texts.write(model, letters, prompts, 20)
    assert capsys.readouterr().out.count("note:") == 1
    assert together == [texts.write(model, letters, prompt, 20) for prompt in prompts]
    assert texts.write(model, letters, [], 20) == []


@pytest.mark.parametrize("stop", [(), "e", "qu"])
def test_a_stream_prints_what_is_returned(tokenizer, stop, capsys):
    model = new_model(tokenizer)
    written = texts.write(model, tokenizer, "the fox", 60, temperature=1.5, stop=stop, stream=True)
    assert capsys.readouterr().out == written + "\n"


def test_what_cannot_be_written_is_explained(letters):
    model = new_model(letters)
    for prompt, options, message in (
        ("", {}, "the prompt is empty"),
        (["abc", ""], {}, "the prompt is empty"),
        ([1, 2], {}, "a prompt must be text, not int"),
        ("abz", {}, "unknown character 'z'"),
        ("abc", dict(n=-1), "n must be 0 or more"),
        ("abc", dict(temperature=-1.0), "temperature must be 0 or more"),
        ("abc", dict(top_k=0), "top_k must be 1 or more"),
        ("abc", dict(top_p=0.0), "top_p must be above 0"),
        ("abc", dict(top_p=1.5), "top_p must be above 0, 1 at most"),
        ("abc", dict(seed="first"), "seed must be int"),
        ("abc", dict(stop=["a", ""]), "a stop string must be text and not empty, not .'a', ''."),
        ("abc", dict(stop=[1]), "a stop string must be text"),
        ("abc", dict(seed=2**64), "seed must be"),
    ):
        with pytest.raises(ValueError, match=message):
            texts.write(model, letters, prompt, **options)


def test_the_command_writes_what_the_function_does(letters, tmp_path):
    path = tmp_path / "model.safetensors"
    model = new_model(letters)
    texts.save_model(model, letters, path)
    command = ["-m", "suite.texts.write", path, "--prompt", "abc", "--tokens", "30", "--seed", "4"]
    done = python(*command, "--temperature", "1.2", "--top-k", "6", "--top-p", "0.9")
    written = texts.write(model, letters, "abc", 30, 1.2, 4, top_k=6, top_p=0.9)
    assert done.stdout.decode() == written + "\n" and not done.stderr


def test_a_folder_that_cannot_be_made_is_named(letters, tmp_path):
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(OSError, match="cannot make the folder .*taken: File exists"):
        texts.save_model(new_model(letters), letters, tmp_path / "taken" / "model.safetensors")


def test_the_command_explains_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["write", str(tmp_path / "nothing"), "--prompt", "abc"])
    with pytest.raises(SystemExit, match="^error: no model file at"):
        runpy.run_module("suite.texts.write", run_name="__main__")


def test_the_command_imports_the_policies_of_a_module(letters, tmp_path, monkeypatch):
    (tmp_path / "sparse_policies.py").write_text(
        "import morlib\n\n\nclass Sparse(morlib.Policy):\n    pass\n\n\nmorlib.POLICIES['sparse'] = Sparse\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(morlib.POLICIES, "sparse", importlib.import_module("sparse_policies").Sparse)
    path = tmp_path / "model.safetensors"
    texts.save_model(new_model(letters, routing="sparse"), letters, path)
    monkeypatch.setenv("PYTHONPATH", f"{files.ROOT}{os.pathsep}{tmp_path}")
    command = [sys.executable, "-m", "suite.texts.write", path, "--prompt", "abc", "--tokens", "5"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "routing must be one of" in refused.stderr
    done = subprocess.run([*command, "--import", "sparse_policies"], capture_output=True, text=True)
    assert done.stdout.startswith("abc") and not done.stderr
    unknown = subprocess.run([*command, "--import", "nosuch"], capture_output=True, text=True)
    assert unknown.stderr == "error: No module named 'nosuch'\n"


def test_a_context_is_the_last_tokens_and_before_the_first_stands_none():
    ids = torch.tensor([[1, 2, 3], [4, 2, 3], [1, 2, 3]])
    one, two, three = (texts.context_numbers(ids, order, 5) for order in (1, 2, 3))
    assert torch.equal(one, ids + 1) and torch.equal(two[:, 0], one[:, 0])
    assert two[0, 2] == two[1, 2] == 4 + 3 * 6 and two[0, 1] != two[1, 1]
    assert three[0, 2] == three[2, 2] == 4 + 3 * 6 + 2 * 36 != three[1, 2]


def test_a_tokenizer_of_another_text_is_refused_though_it_has_as_many_tokens(tmp_path):
    small, capital = tmp_path / "small.txt", tmp_path / "capital.txt"
    small.write_text("abcde fgh\n" * 400, encoding="utf-8")
    capital.write_text("ABCDE FGH\n" * 400, encoding="utf-8")
    own, other = texts.load_corpus(small), texts.load_corpus(capital)
    model = new_model(own.tokenizer)
    model.vocabulary = own.vocabulary
    assert own.vocab_size == other.vocab_size and texts.write(model, own.tokenizer, "abc", 3)
    with pytest.raises(ValueError, match="do not belong together"):
        texts.write(model, other.tokenizer, "ABC", 3)
    with pytest.raises(ValueError, match="do not belong together"):
        texts.save_model(model, other.tokenizer, tmp_path / "m.safetensors")


def test_of_a_part_that_is_shorter_than_a_table_there_is_no_floor(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij" * 8, encoding="utf-8")
    corpus = texts.load_corpus(path)
    shortest = min(len(corpus.ids[part]) for part in ("val", "heldout"))
    assert list(corpus.floors) == [str(order) for order in (2, 3, 4, 5) if order <= shortest]
    assert shortest < 5


def test_a_folder_is_read_without_its_folders_and_hidden_files(tmp_path):
    (tmp_path / "a.txt").write_text("one line of text\n" * 50, encoding="utf-8")
    (tmp_path / "sub.txt").mkdir()
    (tmp_path / "._a.txt").write_bytes(b"\0\1")
    assert texts.sources.text_files(tmp_path) == [tmp_path / "a.txt"]
