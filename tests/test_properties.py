"""What holds for any text, split, packing and routing: drawn by hypothesis, the same draws every time."""

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import morlib
from suite import texts
from suite.texts.corpus import HELDOUT_SHARE

settings.register_profile("suite", derandomize=True, max_examples=40, deadline=None, database=None)
settings.load_profile("suite")

anything = st.text(
    max_size=60
)  # any Unicode but lone surrogates: NUL, combining marks, emoji, right-to-left, ...
lively = st.text(
    alphabet="ab \n\t\r\0\u2581\ufeff\u200dé\u0301কি্ষ😀<0x41>", max_size=60
)  # what tokenizers stumble on


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORLIB_OUTPUTS", str(tmp_path_factory.mktemp("pieces")))
        return texts.SubwordTokenizer("the quick brown fox\nবাংলা ভাষা আমার\n" * 30, 300)


@given(text=anything | lively)
def test_characters_survive_the_round_trip(text):
    tokenizer = texts.CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    assert sorted(set(ids)) == list(range(tokenizer.vocab_size)), "no id without a use"


@given(text=anything | lively)
def test_pieces_survive_the_round_trip(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= i < pieces.vocab_size for i in ids)


@given(first=lively, second=lively)
def test_pieces_of_lines_are_the_lines_pieces(pieces, first, second):
    assert pieces.encode(f"{first}\n{second}") == pieces.encode(first) + pieces.newline + pieces.encode(
        second
    )


@given(
    text=st.text(alphabet="abc \n", min_size=40, max_size=400),
    split=st.sampled_from(sorted(HELDOUT_SHARE)),
    cut=st.none() | st.integers(40, 400),
)
def test_a_split_loses_nothing_and_shares_nothing(tmp_path_factory, text, split, cut):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("x" + text)
    corpus = texts.load_corpus(str(path), split, max_chars=cut)
    parts = [corpus.text[part] for part in ("train", "val", "heldout")]
    assert "".join(parts) == ("x" + text)[:cut] and all(len(part) >= 2 for part in parts)
    assert len(parts[2]) / sum(map(len, parts)) == pytest.approx(HELDOUT_SHARE[split], abs=1 / 40)
    assert all(len(corpus.ids[part]) == len(corpus.text[part]) for part in corpus.text)


@given(
    tokens=st.integers(2, 90),
    length=st.integers(1, 12),
    most=st.none() | st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_windows_predict_each_token_once_and_draws_stay_inside(tokens, length, most, seed):
    ids = torch.arange(tokens)
    corpus = texts.Corpus("any", "full", "", "", None, {}, {"train": ids, "val": ids, "heldout": ids})
    windows = corpus.windows("heldout", length, most)
    assert (windows.diff(dim=1) == 1).all() and windows.shape[1] == min(length, tokens - 1) + 1
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted), "a token is predicted twice"
    if most is None:
        assert predicted == list(range(1, len(predicted) + 1)) and tokens - 1 - len(predicted) < length
    else:
        assert len(windows) == min(most, len(corpus.windows("heldout", length)))
    if tokens > length:
        drawn = corpus.draw(20, length, torch.Generator().manual_seed(seed))
        assert (
            drawn.shape == (20, length + 1)
            and (drawn.diff(dim=1) == 1).all()
            and 0 <= drawn.min()
            and drawn.max() < tokens
        )


@given(rows=st.lists(st.integers(0, 40), min_size=1, max_size=6), data=st.randoms(use_true_random=False))
def test_packing_is_undone_by_unpacking(rows, data):
    if not sum(rows):
        return
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    x = torch.tensor([[data.random(), float(i)] for i in range(len(row))])
    packing = morlib.Packing(row * max(rows), len(rows), max(rows))
    padded = packing.pad(x)
    assert (
        padded.shape == (len(rows), packing.M, 2)
        and max(rows) <= packing.M < max(rows) + 16
        and torch.equal(packing.unpad(padded), x)
    )
    for r, count in enumerate(rows):
        assert torch.equal(padded[r, :count], x[row == r]), "tokens lead in their own row, in order"


class Dice(morlib.Policy):
    """A policy whose decisions are drawn beforehand, one a step, row and position."""

    table = None  # [N, R, B, L]

    def forward(self, step):
        return morlib.Decision(self.table[step.layer, step.recursion, step.row, step.position])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 11), max_size=4, unique=True).map(sorted),
    share=st.sampled_from([0.05, 0.5, 0.95]),
)
def test_a_cache_changes_nothing_whatever_the_routing_and_the_pieces_it_comes_in(seed, B, cuts, share):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(morlib.POLICIES, "dice", Dice)
        torch.manual_seed(seed)
        Dice.table = torch.multinomial(
            torch.tensor([1 - share, share / 2, share / 2]), 3 * 2 * B * 12, replacement=True
        ).view(3, 2, B, 12)
        model = morlib.Transformer(
            morlib.ModelConfig(
                vocab_size=11,
                n_layers=3,
                d_model=16,
                n_heads=2,
                d_ff=40,
                max_len=12,
                dropout=0.0,
                routing="dice",
            )
        ).eval()
        tokens, cache, parts = torch.randint(11, (B, 12)), morlib.Cache(), []
        with torch.no_grad():
            whole = model(tokens)
            for part in torch.tensor_split(tokens, cuts, dim=1):
                parts.append(model(part, cache))
        assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-5)
        assert torch.equal(torch.cat([part.depth for part in parts], 1), whole.depth)
        assert cache.tokens() == int(whole.depth.sum()), "it holds a key for each application, no more"
