"""The analysis of routing: a planted router makes it say yes and no, statistics have known answers, pages show what they should."""

import base64
import dataclasses
import io
import json
import random
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser

import fontTools.ttLib
import matplotlib.ft2font
import numpy as np
import pandas as pd
import pytest
import torch

import analysis
import morlib
import textpage
from morlib import FORWARD, RECURSE, SKIP


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A text of 40,000 characters in which words differ in predictability, and a meter that has learnt a little of it."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("scene")
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 7))) for _ in range(60)]
    (folder / "words.txt").write_text(" ".join(words[min(int(draw.expovariate(0.1)), 59)] for _ in range(8_000)), encoding="utf-8")
    corpus = morlib.load_corpus(str(folder / "words.txt"))
    torch.manual_seed(0)
    config = morlib.ModelConfig(vocab_size=corpus.vocab_size, n_layers=2, d_model=24, n_heads=2, d_ff=48, max_len=16, dropout=0.0, routing="none")
    meter = morlib.build_model(config)
    morlib.train(meter, corpus, morlib.TrainConfig(epochs=3, windows=480, batch_size=16, lr=1e-2, evaluations=1, eval_windows=4))
    windows, known = analysis.places(corpus, meter.eval(), 200)
    return corpus, config, meter, windows, known


def plan_of(score, noise, seed):
    """Applications [4, n, L] of a router of 4 layers that spends 1 to 7 of 8 applications by the rank of a score with noise."""
    rng = np.random.default_rng(seed)
    rank = np.argsort(np.argsort(analysis.scipy.stats.rankdata(score) / score.size + noise * rng.normal(size=score.size))).reshape(score.shape)
    depth = torch.as_tensor(1 + rank * 7 // score.size)
    return torch.stack([(depth - layer * 2).clamp(0, 2) for layer in range(4)])


def mean_by(group, values):
    code = np.unique(group, return_inverse=True)[1].reshape(-1)
    return (np.bincount(code, values.flatten()) / np.bincount(code))[code].reshape(values.shape)


def judged(scene, planted):
    """The verdict on six planted routers, run through a model, beside blind and untrained ones."""
    corpus, config, _, windows, known = scene
    given = [analysis.groups(known["frequency"], 4), known["position"], known["in_word"]]
    rows = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = morlib.build_model(dataclasses.replace(config, n_layers=4, routing="frozen", target_depth=4.0)).eval()
        untrained, blind = model.policy, np.random.default_rng(seed + 100).random(known["surprisal"].shape)
        for name, policy in dict(mor=morlib.Planned(plan_of(planted(known, blind), 0.2, seed)), random=morlib.Planned(plan_of(blind, 0.0, seed)), frozen=untrained).items():
            model.policy = policy
            depth = morlib.score(model, windows, batch_size=len(windows))["depth"].numpy().astype(float)
            r = {column: analysis.rank_correlation(depth, known["surprisal"], factors, draws=10)[0]
                 for column, factors in dict(raw=[], given=given, same=[known["token"], known["position"]]).items()}  # fmt: skip
            rows.append(dict(model=name, seed=seed) | r)
    return analysis.verdict(pd.DataFrame(rows))


@pytest.mark.parametrize("planted, answer", [
    (lambda known, blind: known["surprisal"], "yes, also among places that read the same token: rank correlation +0."),
    (lambda known, blind: blind, "no, depth does not rise with difficulty"),
    (lambda known, blind: -known["surprisal"], "no, depth falls with difficulty: rank correlation -0."),
    (lambda known, blind: mean_by(known["token"], known["surprisal"]), "yes, but only by which token was read"),
    (lambda known, blind: mean_by(known["in_word"], known["surprisal"]), "no, what there is goes with frequency and position"),
], ids=["follows", "blind", "against", "by token", "by place in the word"])  # fmt: skip
def test_a_planted_router_is_seen_for_what_it_is(scene, planted, answer):
    assert judged(scene, planted).startswith(answer)


def test_a_claim_needs_six_seeds_and_controls_that_show_less():
    rows = pd.DataFrame([dict(model=m, seed=s, raw=0.3 + s / 100, given=0.2 + s / 100, same=0.1 + s / 100) for m in ("mor", "frozen") for s in range(6)])
    assert analysis.verdict(rows).startswith("no, frozen routing shows as much")
    assert analysis.verdict(rows[rows["seed"] < 5]).startswith("open, 5 seed(s) are too few")
    rows.loc[rows["model"] == "frozen", ["raw", "given", "same"]] *= np.random.default_rng(0).random((6, 1)) / 2
    assert analysis.verdict(rows).startswith("yes, also")


def test_a_plan_is_carried_out(make_model):
    """A router's own decisions replayed give its loss and depth; others run exactly what they say."""
    model, windows = make_model(routing="mor", max_recursions=3), torch.randint(11, (20, 13), generator=torch.Generator().manual_seed(1))
    own = morlib.score(model, windows)
    plan = analysis.applications(own["actions"])
    assert np.allclose(analysis.forced(model, windows, plan, batch_size=7), own["surprisal"].numpy(), atol=1e-6)
    assert isinstance(model.policy, morlib.Router), "the router is back in its place"
    model.policy = morlib.Planned(torch.tensor([0, 1, 3])[:, None, None].expand(3, 20, 12))
    actions = morlib.score(model, windows)["actions"]
    assert (actions[0, 0] == SKIP).all() and (actions[1, 0] == FORWARD).all()
    assert (actions[2, 0] == RECURSE).all() and (actions[2, 1] == RECURSE).all() and (actions[2, 2] == FORWARD).all()


def test_interventions_change_what_they_say(make_model):
    model, windows = make_model(routing="mor", n_layers=4), torch.randint(11, (30, 13), generator=torch.Generator().manual_seed(1))
    own, hardness = analysis.applications(morlib.score(model, windows)["actions"]), np.random.default_rng(0).random((30, 12))
    plans = analysis.plans(own, hardness, 2)
    sums = {name: plan.sum(0) for name, (plan, _) in plans.items()}
    for name in ("depths shuffled in each sequence", "deepest to the hardest", "deepest to the easiest"):
        assert torch.equal(sums[name].sort(1)[0], own.sum(0).sort(1)[0]), "each sequence keeps its depths"
    order = torch.as_tensor(np.argsort(-hardness, axis=1))
    assert (sums["deepest to the hardest"].gather(1, order).diff(dim=1) <= 0).all()
    assert (sums["deepest to the easiest"].gather(1, order).diff(dim=1) >= 0).all()
    assert (sums["the same depth for all"] == round(own.sum(0).double().mean().item())).all()
    for name, (plan, where) in plans.items():
        assert plan.shape == own.shape and plan.min() >= 0 and plan.max() <= 2
        if "tenth" in name:
            assert abs(where.mean() - 0.1) < 0.01 and torch.equal(plan[:, ~where], own[:, ~where]), "the others are left alone"
        if "once more" in name:
            assert set((plan - own).sum(0)[torch.as_tensor(where)].tolist()) <= {0, 1}
    table = analysis.interventions(model, windows, hardness).set_index("intervention")
    assert (table["low"] <= table["there"]).all() and (table["there"] <= table["high"]).all()


def test_the_oracle_loses_to_no_router(make_model):
    model, meter = make_model(routing="mor", n_layers=4), make_model(routing="none")
    windows = torch.randint(11, (30, 13), generator=torch.Generator().manual_seed(1))
    found = analysis.oracle(model, windows, meter, 20)
    assert found["places"] == 20 and found["hindsight"] >= found["foresight"] and found["hindsight"] >= 0 and found["decision"] >= 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("action", (SKIP, FORWARD))
def test_a_router_that_decides_nothing_is_no_failure(make_model, action):
    model, windows = (
        make_model(routing="random", action_rates=[[[float(a == action) for a in range(3)]] * 2] * 3),
        torch.randint(11, (20, 13), generator=torch.Generator().manual_seed(1)),
    )
    seen, hardness = morlib.score(model, windows), np.random.default_rng(0).random((20, 12))
    assert analysis.rank_correlation(seen["depth"].numpy().astype(float), hardness) == (0.0, 0.0, 0.0)
    assert analysis.variance_explained(analysis.applications(seen["actions"]).numpy(), {"token": windows[:, :-1].numpy()})["rest"] == 0
    assert analysis.interventions(model, windows, hardness)["there"].iloc[0] == pytest.approx(0, abs=1e-6), "equal depths can be shuffled"
    assert analysis.oracle(model, windows, make_model(routing="none"), 10)["layers"] == (3 if action == SKIP else 0)


def test_a_watched_training_is_the_same_training(corpus, quick_training):
    """The curves of a run seen on its way are those of the run that was not watched."""
    looks, states = [], []
    for watch in (None, lambda step, model: looks.append((step, morlib.score(model, corpus.windows("val", 12, 4))["depth"].double().mean()))):
        torch.manual_seed(0)
        model = morlib.build_model(morlib.ModelConfig(vocab_size=corpus.vocab_size, n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.1, target_depth=2.0))
        morlib.train(model, corpus, quick_training, watch=watch)
        states.append(model.state_dict())
    assert [step for step, _ in looks] == [4, 8] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert looks[-1][1] == morlib.score(model, corpus.windows("val", 12, 4))["depth"].double().mean()


def test_rank_correlation_has_known_answers():
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(200, 20))
    x, y, other = cause + rng.normal(size=cause.shape), cause + rng.normal(size=cause.shape), rng.normal(size=cause.shape)
    plain = analysis.rank_correlation(x, y)
    assert plain[0] == pytest.approx(analysis.scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic, abs=1e-9) and plain[1] < plain[0] < plain[2]
    assert abs(analysis.rank_correlation(x, y, [analysis.groups(cause, 50)])[0]) < 0.05, "two effects of one cause are unrelated given the cause"
    low, high = analysis.rank_correlation(x, other)[1:]
    assert low < 0 < high
    half = np.where(np.arange(20) < 10, np.nan, y)
    assert analysis.rank_correlation(x, half)[0] == pytest.approx(analysis.scipy.stats.spearmanr(x[:, 10:].flatten(), y[:, 10:].flatten()).statistic, abs=1e-9)
    assert analysis.rank_correlation(np.ones_like(x), y) == (0.0, 0.0, 0.0)


def test_the_interval_over_windows_covers_as_often_as_it_says():
    """Places of one window share a draw, so an interval that took them for independent would be far too narrow."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        shared_x, shared_y = rng.normal(size=(2, 80, 1))
        low, high = analysis.rank_correlation(shared_x + 0.3 * rng.normal(size=(80, 12)), shared_y + 0.3 * rng.normal(size=(80, 12)), draws=200)[1:]
        covered += low < 0 < high
    assert covered >= 52


def test_variance_is_given_to_what_made_it():
    rng = np.random.default_rng(0)
    layer, place = np.arange(4)[:, None, None], np.broadcast_to(np.arange(30), (4, 400, 30))
    token = rng.integers(50, size=(400, 30))
    made = 2.0 * layer + 1.5 * rng.normal(size=50)[token] + rng.normal(size=(4, 400, 30))  # variances 5, about 2.25, 1
    found = analysis.variance_explained(made, {"layer": layer, "position": place, "token": token, "noise": rng.integers(3000, size=(400, 30))})
    total = made.var()
    assert found["layer"] == pytest.approx(100 * 5 / total, abs=1.0) and found["rest"] == pytest.approx(100 * 1 / total, abs=1.5)
    assert abs(found["position"]) < 0.5 and abs(found["noise"]) < 1.5, "what has no part in it explains nothing, however many groups it has"
    assert sum(found.values()) == pytest.approx(100)


def test_rates_by_group_add_up(make_model):
    model, windows = make_model(routing="mor"), torch.randint(11, (20, 13), generator=torch.Generator().manual_seed(1))
    seen = morlib.score(model, windows)
    table = analysis.rates(seen["actions"], windows[:, :-1].numpy())
    assert np.allclose(table[list(morlib.ACTIONS)].sum(axis=1), 100) and table["places"].sum() == 240
    assert table["depth"] @ table["places"] == pytest.approx(float(seen["depth"].sum()))


def test_groups_keep_equal_values_together():
    values = np.array([[1.0, 1, 1, 1, 2, 3], [4, 5, 6, 7, 8, np.nan]])
    found = analysis.groups(values, 4)
    assert len(set(found[0, :4])) == 1 and found[1, 5] == -1 and (np.diff(found.flatten()[:-1]) >= 0).all() and set(found.flatten()) == set(range(-1, found.max() + 1))


def test_the_places_are_the_texts(scene):
    corpus, _, meter, windows, known = scene
    assert known["surprisal"].shape == windows[:, :-1].shape == known["kind"].shape
    assert torch.equal(torch.as_tensor(known["token"]), windows[:, :-1])
    assert np.allclose(known["surprisal"], morlib.score(meter, windows)["surprisal"].numpy(), atol=1e-5)
    assert np.allclose(known["read"][:, 1:], known["surprisal"][:, :-1]) and np.isnan(known["read"][:, 0]).all()
    whole = morlib.ngram_surprisal(corpus.ids["train"], corpus.ids["heldout"], 3, corpus.vocab_size)[0]
    assert np.allclose(known["ngram"][0, 1:], whole[: windows.shape[1] - 2]), "the trigram sees across the windows' borders"
    assert whole.mean() == pytest.approx(morlib.ngram_floor(corpus.ids["train"], corpus.ids["heldout"], 3, corpus.vocab_size)["loss"])


def test_kinds_of_characters():
    text = "O Romeo, I'll\ngo 3 times."
    found, place = analysis.kinds(morlib.CharTokenizer(text), morlib.CharTokenizer(text).encode(text))
    assert dict(zip(text, found)) == {"O": "capital", " ": "space", "R": "capital", "o": "letter", "m": "letter", "e": "letter", ",": "punctuation", "I": "capital",
                                            "'": "punctuation", "l": "letter", "\n": "newline", "g": "letter", "3": "digit", "t": "letter", "i": "letter", "s": "letter",
                                            ".": "punctuation"}  # fmt: skip
    assert place[2:8].tolist() == [0, 1, 2, 3, 4, 0] and place[9:14].tolist() == [0, 1, 2, 3, 0], "an apostrophe stands within its word"


def test_kinds_of_bangla_pieces():
    class Pieces:
        kind, newline = "sentencepiece", [0]
        made = ["<0x0A>", "▁বাংলা", "দেশ", "ের", "▁যুক্ত", "▁১৯৭১", "।", "▁", "<0xE0>", "▁নদী"]

        @property
        def pieces(self):
            return type("Inner", (), {"id_to_piece": lambda _, i: self.made[i]})()

    found, place = analysis.kinds(Pieces(), range(10))
    assert found.tolist() == ["newline", "word-initial", "continuation", "suffix", "conjunct", "digit", "danda", "space", "byte", "word-initial"]
    assert place.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 0, 0]


def test_how_a_tokenizer_cuts_bangla():
    class Cuts:
        kind, newline, vocab_size = "sentencepiece", [99], 8
        made = ["যু", "ক্", "তি", "▁", "<0xE0>", "<0xA6>", "<0x95>", "্ষ"]
        pieces = type("Inner", (), {"id_to_piece": lambda _, i: Cuts.made[i]})()

        def encode(self, text):
            return range(8)

    text = "যুক্তি ক্ষ"
    assert analysis.cuts(Cuts(), text) == {2, 4, 6, 7, 8, 10}, "three bytes make one character"
    found = analysis.segmentation(Cuts(), text)
    assert found["fertility (tokens a word)"] == 4 and found["byte tokens (%)"] == 37.5 and found["vowel signs cut off (%)"] == 0
    assert found["conjuncts whole (%)"] == 0, "kta is cut by a piece's end, ksha by its bytes"
    Cuts.made = ["যু", "ক্তি", "▁", "ক", "্", "ষ", "", ""]
    assert analysis.segmentation(Cuts(), text)["conjuncts whole (%)"] == 50
    letters = analysis.segmentation(morlib.CharTokenizer(text), text)
    assert letters["conjuncts whole (%)"] == 0 and letters["vowel signs cut off (%)"] == 100 and letters["byte tokens (%)"] == 0


@pytest.mark.parametrize("word, found", [("ক্ষ", ["ক্ষ"]), ("স্ত্রী", ["স্ত্র"]), ("র\u200d্যাব", ["র\u200d্য"]), ("ক্\u200cষ", []), ("বড়্গ", ["ড়্গ"]), ("কক", [])])
def test_what_counts_as_a_conjunct(word, found):
    assert [m.group() for m in analysis.CONJUNCT.finditer(unicodedata.normalize("NFC", word))] == [unicodedata.normalize("NFC", f) for f in found]


@pytest.fixture
def sections(make_model):
    """Two texts as a page shows them, with everything in them that a page might trip over."""
    english, bangla = '<b>&amp; "it\'s"</b>\n</script> end', "বাংলা ভাষায় যুক্তাক্ষর: ক্ষ, স্ত্রী।"
    made = []
    for lang, text in (("en", english), ("bn", bangla)):
        codec = morlib.CharTokenizer(text)
        model, meter = (make_model(routing=routing, vocab_size=codec.vocab_size) for routing in ("mor", "none"))
        made.append(textpage.section(f"Text <{lang}>", "a note", lang, model, meter, codec, text) | {"whole": text})
    return made


def test_a_section_is_what_the_models_say(make_model, sections):
    part = sections[0]
    codec = morlib.CharTokenizer(part["whole"])
    model, ids = make_model(routing="mor", vocab_size=codec.vocab_size), torch.tensor(codec.encode(part["whole"]))
    assert "".join(part["tokens"]) == part["whole"] and len(part["depth"]) == len(part["surprisal"]) == len(part["runs"]) == len(part["tokens"]) - 1
    last = len(ids) - 1 - (len(ids) - 1) % 12  # the last window is shorter, and shown all the same
    out = model(ids[None, last:-1])
    assert part["depth"][last:] == out.depth[0].tolist() and [sum(runs) for runs in part["runs"]] == part["depth"]
    expected = out.logits.softmax(-1)[0].gather(-1, ids[last + 1 :, None])[:, 0]
    assert torch.allclose(torch.tensor(part["probability"][last:]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="two tokens or more"):
        textpage.section("", "", "en", model, model, codec, "b")


def test_tokens_of_one_sign_stay_together():
    assert textpage.together(list("ab c")) == [[1], [2], [3]]
    assert textpage.together(["▁", "শ", "্র", "ি", "উ", "ক্", "ষ", "া"]) == [[1, 2, 3], [4], [5, 6, 7]]
    part = dict(tokens=["x", "ক", "ি", "খ"], depth=[0, 6, 3])
    assert [span[:3] for span in textpage.painted(part, "depth")[0]] == [(1, 2, 3), (3, 1, 6)], "the mean shade of both, then one alone"


class Seen(HTMLParser):
    """The text of each <pre>, the addresses asked for, and the data of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.addresses, self.inside, self.data = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside.append((tag, dict(attributes)))
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset")]
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if any(tag == "pre" for tag, _ in self.inside):
            self.texts[-1] += data
        if self.inside and self.inside[-1][1].get("id") == "data":
            self.data += data


def test_the_page_holds_all_tokens_and_asks_for_nothing(sections):
    page = textpage.page(sections)
    seen = Seen(page)
    assert [text.replace("↵\n", "\n") for text in seen.texts] == [part["whole"] for part in sections for _ in range(2)]
    assert seen.addresses == [] and not re.search(r"https?:|url\((?!data:)|@import", page)
    for kept, part in zip(json.loads(seen.data), sections):
        assert kept["tokens"] == part["tokens"] and kept["depth"] == part["depth"] and kept["runs"] == part["runs"]
    assert page.count("</script>") == 2 and "<b>&amp;" not in page, "what a text holds is no markup"
    fragment = textpage.fragment(sections[0])
    assert [text.replace("↵\n", "\n") for text in Seen(fragment).texts] == [sections[0]["whole"]] * 2


def test_every_shade_can_be_read_and_rises():
    for what in textpage.HUES:
        for dark in (False, True):
            shades = textpage.shades(what, dark)
            assert min(textpage.contrast(*shade) for shade in shades) >= 4.5
            light = [textpage.luminance(back) for back, _ in shades]
            assert (np.diff(light) * (1 if dark else -1) > 0.01).all(), "in grey too, more is darker on white, lighter on black"
    assert textpage.contrast("#000000", "#ffffff") == pytest.approx(21)


PROBE = """<script>
const failures=[],found={};addEventListener('error',e=>failures.push(e.message));
addEventListener('load',()=>{
 const spans=[...document.querySelectorAll('pre span[data-i]')],bar=document.getElementById('bar');
 spans[2].dispatchEvent(new MouseEvent('mouseover',{bubbles:true}));found.hover=bar.innerText;
 const focus=e=>{e.focus();if(!document.hasFocus())e.dispatchEvent(new FocusEvent('focusin',{bubbles:true}))};  // a window in the background fires none
 focus(spans[0]);found.focus=bar.innerText;
 spans[0].dispatchEvent(new KeyboardEvent('keydown',{key:'ArrowRight',bubbles:true}));
 found.moved=bar.innerText;found.active=document.activeElement===spans[1];found.marked=document.querySelectorAll('.on').length;
 found.stops=document.querySelectorAll('pre span[tabindex="0"]').length;
 const joined=spans.find(s=>+s.dataset.n>1);focus(joined);found.joined=[+joined.dataset.n,bar.querySelectorAll('dl').length];
 const channel=v=>{v/=255;return v<=0.04045?v/12.92:((v+0.055)/1.055)**2.4};
 const light=c=>{const [r,g,b]=c.match(/[\\d.]+/g).map(Number);return 0.2126*channel(r)+0.7152*channel(g)+0.0722*channel(b)};
 const ratio=e=>{const s=getComputedStyle(e);let b=e;while(getComputedStyle(b).backgroundColor==='rgba(0, 0, 0, 0)')b=b.parentElement;
  const [x,y]=[light(s.color),light(getComputedStyle(b).backgroundColor)].sort((p,q)=>q-p);return (x+0.05)/(y+0.05)};
 const least=()=>Math.min(...[...document.querySelectorAll('span[data-i],p,h1,h2,h3,.key,button,#bar dt,#bar dd,.runs b')].map(ratio));
 const look=()=>({least:least(),back:getComputedStyle(document.body).backgroundColor});
 found.first=look();document.getElementById('theme').click();found.second=look();
 found.wide=document.documentElement.scrollWidth>innerWidth;found.fetched=performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length;
 found.failures=failures;const out=document.createElement('script');out.type='text/plain';out.id='found';out.textContent=JSON.stringify(found);document.body.append(out)});
</script>"""


@pytest.mark.parametrize("theme", ("light", "dark"))
def test_the_page_in_a_browser(tmp_path, sections, theme):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if not browser:
        pytest.skip("no Chromium or Chrome is installed: the page is checked without a browser only")
    (tmp_path / "page.html").write_text(textpage.page(sections).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
               "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=420,900", f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
               "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "page.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'id="found">(.*?)</script>', done.stdout, re.S)
    assert match, done.stderr[-500:]
    found, part = json.loads(match[1]), sections[0]
    assert found["failures"] == [] and found["fetched"] == 0 and not found["wide"]
    for text, i in ((found["hover"], 3), (found["focus"], 1), (found["moved"], 2)):
        assert f"{part['tokens'][i]}".replace(" ", "␣") in text and f"{100 * part['probability'][i - 1]:.1f} %" in text and f"{part['depth'][i - 1]} applications" in text
        words = {0: "skip", 1: "forward", 2: "recurse ×2"}
        assert re.sub(r"\s+", " ", text).endswith(" ".join(f"{layer} {words[n]}" for layer, n in enumerate(part["runs"][i - 1], 1)))
    assert found["active"] and found["marked"] == 2 and found["stops"] == 4, "one tab stop a text; the same token is marked on both sides"
    assert found["joined"][0] == found["joined"][1] > 1, "tokens written as one sign are told one by one"
    assert min(found["first"]["least"], found["second"]["least"]) >= 4.5
    white, black = "rgb(255, 255, 255)", "rgb(13, 17, 23)"
    assert [found["first"]["back"], found["second"]["back"]] == ([white, black] if theme == "light" else [black, white]), "as the system asks, then the other"


def ink(text, shaped):
    """The pixels of a text in the suite's Bangla font, as figures draw it, or one glyph a character as if nothing shaped it."""
    from matplotlib import pyplot as plt

    morlib.figure_style()
    figure = plt.figure(figsize=(4, 1), dpi=100, layout="none")
    if shaped:
        figure.text(0.1, 0.4, text, fontsize=24)
    else:
        font = matplotlib.ft2font.FT2Font(str(morlib.bangla_font()))
        font.set_size(24, 100)
        left = 0.1
        for character in text:
            figure.text(left, 0.4, character, fontsize=24)
            left += font.load_char(ord(character)).linearHoriAdvance / 65536 / 400
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., 0] < 128
    plt.close(figure)
    columns = np.nonzero(pixels.any(0))[0]
    return pixels, columns[-1] - columns[0] + 1


def ends_like(word, letter):
    """Whether the right end of a word is the letter, below the line from which Bangla hangs."""
    right, left = (np.nonzero(pixels.any(0))[0] for pixels in (word, letter))
    width = left[-1] - left[0] + 1
    return (word[45:60, right[-1] + 1 - width : right[-1] + 1] == letter[45:60, left[0] : left[-1] + 1]).mean() > 0.95


def test_the_font_of_a_page_shapes_its_text(sections):
    """What is left of the font in a page still joins and reorders: its substitution rules are there for the letters that the text has."""
    sections[1]["tokens"][-1:] += ["ক", "\u09cc"]
    rule = textpage.face(sections)
    font = fontTools.ttLib.TTFont(io.BytesIO(base64.b64decode(re.search(r"base64,([^)]+)", rule)[1])))
    assert {ord(c) for c in sections[1]["whole"]} | {0x09CC, 0x09C7, 0x09D7} <= set(font.getBestCmap()), "both parts of the sign au too"
    features = {record.FeatureTag for record in font["GSUB"].table.FeatureList.FeatureRecord}
    assert {"half", "pres"} & features and len(rule) < 120_000 and textpage.face(sections[:1]) == ""


def test_bangla_in_figures_is_shaped(recwarn):
    conjunct, narrow = ink("ক্ষ", True)
    _, wide = ink("ক্ষ", False)
    assert narrow < 0.75 * wide, "ka + hasanta + ssa is one conjunct, narrower than the letters"
    letter = ink("ক", True)[0]
    assert ends_like(ink("কি", True)[0], letter), "the vowel sign i stands before its consonant"
    assert not ends_like(ink("কি", False)[0], letter)
    assert not [w for w in recwarn if "missing from font" in str(w.message)]


@pytest.mark.parametrize("notebook, given, message", [
    ("05_routing_analysis", dict(own_text="a"), "own_text needs two characters"),
    ("05_routing_analysis", dict(own_text=3), "own_text must be str"),
    ("05_routing_analysis", dict(texts=["hamlet"]), "one or more of tinyshakespeare, bangla"),
    ("05_routing_analysis", dict(texts=[]), "one or more of tinyshakespeare, bangla"),
    ("05_routing_analysis", dict(sample=1), "sample 10 windows or more"),
    ("04_bangla", dict(vocabularies=[200]), "sizes above 256"),
    ("04_bangla", dict(vocabularies=["4000"]), "sizes above 256"),
])  # fmt: skip
def test_a_notebook_refuses_what_it_cannot_do(notebook, given, message):
    """The parameters cell and the check after it, without the rest."""
    cells = json.loads((morlib.ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    space = {"morlib": morlib}
    exec("".join(cells[at]["source"]), space)
    space |= {"preset": "smoke"} | given
    with pytest.raises(ValueError, match=message):
        exec("".join(cells[at + 1]["source"]), space)


# ---- Studies ----


def study_record(model, seed, E=8.0, loss=2.0, rates=None, val=(3.0, 2.1), target=2.0, sampled=None, followed=None):
    """What the tables of studies read of a record, as `morlib.table_of` lays it out."""
    config = dataclasses.asdict(morlib.ModelConfig(vocab_size=9, n_layers=3, target_depth=target))
    sampled = sampled or dict(loss=loss + 0.01, effective_depth=E - 0.2)
    metrics = dict(accuracy=100 - 20 * loss, loss=loss, effective_depth=E, train_seconds=9.0, did_train=True, action_rates=rates, sampled=sampled)
    metrics |= dict(followed=dict(effective_depth=followed)) if followed else {}
    history = [dict(val_loss=v, val_accuracy=10 * v) for v in val]
    return dict(experiment="study", model=model, recipe="sound", preset="smoke", seed=seed, data=dict(name="t"), metrics=metrics, history=history, config=dict(model=config))


def test_the_front_says_where_mor_lies():
    records = [study_record(f"fixed {k}", seed, E=k, loss=2 - k / 100) for k in (3, 4, 5) for seed in (0, 1)]
    records += [study_record(f"mor {k}", seed, E=k + 0.15 * (k == 4), loss=2 - k / 100 - 0.02 * (k > 3)) for k in (3, 4, 5) for seed in (0, 1)]
    records += [study_record(f"random {k}", seed, E=k, loss=2.1) for k in (3, 4) for seed in (0, 1)]
    front = morlib.table_of(records)
    fixed, blind, depth, held = analysis.front_lines(front)
    assert "at 1 of 2 depths" in fixed and "-0.0100" in fixed, "at all its layers MoR is the fixed model"
    assert "at 2 of 2 depths" in blind and "1.9500 (5 layers) to 1.9700 (3 layers)" in depth
    assert "in 2 of 4 runs, 0.15 from it" in held
    records = [r if not r["model"].startswith("mor") else r | dict(metrics=r["metrics"] | dict(followed=dict(effective_depth=float(r["model"][-1]) - 0.02))) for r in records]
    assert "follow the text read so far: within 0.1 of its target in 4 of 4 runs, 0.02 from it" in analysis.front_lines(morlib.table_of(records))[-1]
    assert analysis.front_table(front).loc[("mor", 4), "loss"] == pytest.approx(1.94)
    figure = analysis.draw_front(front)
    assert len(figure.axes[0].lines) == 3 and list(figure.axes[0].lines[0].get_xdata()) == [3, 4, 5]


def test_settings_are_ordered_by_validation_loss_at_the_end():
    table = analysis.by_validation(morlib.table_of([study_record("a", 0, val=(1.0, 2.2)), study_record("b", 0, val=(3.0, 2.0)), study_record("b", 1, val=(3.0, 2.2))]))
    assert list(table.index) == ["b", "a"] and table.loc["b", "validation loss"] == pytest.approx(2.1) and table.loc["b", "seeds"] == 2
    assert "a new seed" not in table
    three = morlib.table_of([study_record("a", seed, val=(3.0, loss)) for seed, loss in enumerate((2.0, 2.1, 2.2))])
    reach = 4.303 * 0.1 * (4 / 3) ** 0.5  # Student's t of two degrees of freedom
    assert analysis.by_validation(three).loc["a", "a new seed"] == f"{2.1 - reach:.3f} to {2.1 + reach:.3f}"
    assert table.loc["a", "E"] == 8.0 and table.loc["a", "E sampled"] == 7.8 and table.loc["a", "loss sampled - argmax"] == pytest.approx(0.01)


def test_collapsed_routers_are_counted_where_there_is_a_choice():
    """Of 3 layers at depth 2 the budget runs one or more for everyone; a layer of one action there is no collapse."""
    choice = [run < 1 for run, _ in morlib.depth_budget(morlib.ModelConfig(vocab_size=9, n_layers=3, target_depth=2.0))]
    assert 0 < sum(choice) < 3
    alive = [[[0.5, 0.3, 0.2]] if c else [[0.0, 1.0, 0.0]] for c in choice]
    dead = [[[1.0, 0.0, 0.0]] if c else [[0.0, 1.0, 0.0]] for c in choice]
    table = analysis.collapse_table(morlib.table_of([study_record("mor 2", 0, rates=alive), study_record("mor 2", 1, rates=dead, E=8.3)]))
    row = table.loc["mor 2"]
    assert row["seeds"] == 2 and row["layers with a choice"] == sum(choice) and row["of them collapsed, all seeds"] == sum(choice)
    assert row["E"] == "8.00 to 8.30" and row["E, followed"] == ""
    row = analysis.collapse_table(morlib.table_of([study_record("mor 2", seed, rates=alive, followed=2.0 + seed / 100) for seed in (0, 4)])).loc["mor 2"]
    assert row["E, followed"] == "2.00 to 2.04" and row["of them collapsed, all seeds"] == 0
    row = table.loc["mor 2"]
    assert row["skip (%)"] == 75 and row["recurse (%)"] == 10


def test_the_sources_table_keeps_its_order_and_marks_what_did_not_train():
    failed = study_record("fixed 12", 0, loss=3.3)
    failed["metrics"]["did_train"] = False
    table = analysis.sources_table(morlib.table_of([failed, study_record("a", 0, loss=2.0)]))
    assert list(table.index) == ["fixed 12", "a"] and list(table["trained"]) == ["did not train", "yes"] and table.loc["fixed 12", "accuracy (%)"] == 34.0
    assert list(table["seeds"]) == [1, 1] and "a new seed (%)" not in table


def test_vocabularies_are_ordered_by_bits_per_byte():
    records = pd.DataFrame([dict(model=m, bits_per_byte=b) for m, b in (("1000-pieces", 0.9), ("1000-pieces", 1.0), ("characters", 0.8))])
    table = analysis.vocabulary_table(records)
    assert list(table.index) == ["characters", "1000-pieces"] and table.loc["1000-pieces", "bits per byte"] == 0.95 and "a new seed" not in table
    three = analysis.vocabulary_table(pd.concat([records, records.iloc[:1]]))
    assert list(three["seeds"]) == [1, 3] and list(three["a new seed"].str.len() > 0) == [False, True]
