"""All answers at a glance: in words without intervals, in numbers with them."""

import re

import pandas as pd
import pytest

import morlib
from suite import report, results, runs
from suite.results import glance, headlines, stats, tables


@pytest.mark.parametrize(
    "told, short",
    [
        ("ahead (−0.26 points, 90 % interval −0.49 to −0.04; six seeds), and", "ahead (−0.26 points), and"),
        ("+0.80 points (95 % interval +0.65 to +0.96; six seeds). It", "+0.80 points. It"),
        ("(−0.18, 95 % interval −0.76 to +0.40; three of six seeds).", "(−0.18; three of six seeds)."),
        ("+2 points (95 % interval −1 to +5; three of six seeds)", "+2 points (three of six seeds)"),
        ("+2 points (six seeds), +3 (six seeds of one)", "+2 points, +3 (six seeds of one)"),
        ("six seeds, and (E 2.3) stays", "six seeds, and (E 2.3) stays"),
    ],
)  # fmt: skip
def test_words_lose_their_intervals_and_keep_what_else_they_say(told, short):
    assert results.without_intervals(told) == short


@pytest.fixture(scope="module")
def table():
    """All answers, of the records that ship; to be read alone."""
    return results.glance_table()


def test_every_number_of_the_readme_stands_in_the_table_with_its_interval(table):
    part = report.readme_part()
    assert not re.search(r"9[05] % interval ", part)
    shown = [value.replace("\u2212", "-") for value in table["points"]]
    told = [value.replace("\u2212", "-") for value in re.findall(r"([+\u2212][\d.]+) points", part)]
    assert len(told) >= 5
    token_worth_on_text = results.text_sentence()
    for value in told:
        digits = len(value.partition(".")[2])
        rounded = {f"{float(other):+.{digits}f}" for other in shown}
        assert value in rounded or value.replace("-", "\u2212") in token_worth_on_text


def test_each_cell_on_text_is_a_comparison_of_its_experiment_with_a_row_in_the_table(table):
    told, table = table, results.text_table()
    assert len(table) == len(glance.TEXTS) and list(table)[1:] == list(glance.AGAINST)
    front = runs.stored_records("pareto")
    for experiment, row in zip(glance.TEXTS, table.to_dict("records")):
        stored = runs.stored_records(experiment)
        for column, (a, b) in glance.side_pairs(experiment).items():
            records = stored
            if experiment == "exp1" and column == glance.AGAINST[0]:
                records, a, b = front, "fixed 12", "fixed 6"
            if not {a, b} <= set(records["model"]):
                assert row[column] == "\u2013"
                continue
            c = results.compare(records, a, b)
            n = f" ({c['pairs']})" if c["pairs"] < 6 else ""
            points = results.signed(c["mean"])
            shown = (
                f"**{points}**"
                if stats.different(c) and c["pairs"] > 5
                else points.replace("\u22120.00", "0.00")
            )
            assert row[column].removesuffix(", loss worse") == shown + n
            assert row[column].endswith(", loss worse") == bool(headlines.loss_apart(records, a, b))
            same = told[told["setting"] == glance.setting(records[records["model"].isin([a, b])])]
            assert points in set(same["points"])
    assert table.index[0] == "Tiny Shakespeare, width 64, 6 epochs"
    for row, labels in ((1, ("mor", "fixed-at-E")), (4, ("mor-equal-epochs", "fixed-shallow"))):
        mor, cheap = labels
        pairs = ("fixed-deep", "fixed-shallow"), (mor, "fixed-deep"), (mor, cheap), (mor, "frozen")
        own = runs.stored_records(glance.TEXTS[row])
        assert table.iloc[row, 1:].tolist() == [glance.points(own, *pair) for pair in pairs], "by its head"
    assert "loss worse" in table.to_string() and "**" in table.to_string()


def test_what_the_protocol_of_the_sources_shows_is_told_from_its_records():
    records = runs.stored_records("exp2")
    told = results.protocol_sentence(records)
    for label, name in (("fixed-shallow", "six fixed layers"), ("fixed-long", "as many that train as long")):
        points = results.signed(results.compare(records, "mor-source-protocol", label)["mean"])
        assert f"{points} points against {name}" in told
    assert results.protocol_sentence(records[records["model"] != "fixed-long"]) == ""


def test_a_row_is_the_comparison_of_its_models(table):
    row = table[table["who against whom"] == "MoR (equal epochs) against 6 layers"].iloc[0]
    c = results.compare(runs.stored_records("exp2"), "mor-equal-epochs", "fixed-shallow")
    assert row["points"] == results.signed(c["mean"])
    assert row["setting"] == "tinyshakespeare, halves, width 64, 6 epochs"
    assert table["setting"].str.startswith("hops-8-6, width 32, 8,000 steps").sum() >= 6


def test_without_records_there_is_no_row(tmp_path, monkeypatch):
    nothing = results.glance_table(tmp_path)
    assert nothing.empty
    monkeypatch.setattr(results, "glance_table", lambda: nothing)
    assert report.glance() == []


def test_the_page_has_a_table_a_text_with_each_row_once(table, monkeypatch):
    monkeypatch.setattr(results, "glance_table", lambda: table)
    parts = report.glance()
    texts = [part.strip("*") for part in parts[2::2]]
    assert texts == ["tinyshakespeare", "tinyshakespeare, halves", "bangla-wikipedia, 90/10", "hops-8-6"]
    rows = [line for part in parts[3::2] for line in part.splitlines()[2:]]
    assert len(rows) == len(table) and len(parts) == 2 + 2 * len(texts)
    shown = []
    for row in rows:
        setting, _, points, *_ = (cell.strip() for cell in row.strip("| ").split(" | "))
        shown.append((setting, points))
    told = [
        (setting[setting.index("width ") :], points)
        for setting, points in zip(table["setting"], table["points"])
    ]
    assert sorted(shown) == sorted(told)


def test_counting_is_named_where_it_is_ahead():
    """By loss and by its guess, by loss alone, or by neither: what the answer says of early training."""
    records = runs.stored_records("exp2")
    told = results.early_sentence("exp2", records)
    assert "counting 5-grams has a lower loss (1.848 against 1.910 nats) and guesses right more often" in told
    assert told.endswith("than six layers after 6 epochs.")
    assert results.early_sentence("exp2", records.assign(loss=1.0, accuracy=99.0)) == ""
    by_guess = results.early_sentence("exp2", records.assign(loss=1.0))
    assert "guesses right more often" in by_guess and "lower loss" not in by_guess


def test_an_experiment_s_short_answer_follows_the_records(tmp_path, moved):
    exp1, exp2 = runs.stored_records("exp1"), runs.stored_records("exp2")
    eight = "no better than eight fixed layers"
    assert results.short_answer("exp1", exp1) == f"Yes, but {eight}; not after longer training."
    told = results.short_answer("exp1", exp1, tmp_path)
    assert told == f"Yes, but {eight}; of longer training no record ships."
    ahead = moved(exp1, "mor", 2.0)
    told = results.short_answer("exp1", ahead, tmp_path)
    assert told == "Yes, and better than eight fixed layers; of longer training no record ships."
    assert results.short_answer("exp1", moved(exp1, "mor", -2.0)) == "No."
    assert results.short_answer("exp1", exp1[exp1["seed"] < 3]) == "Not shown."
    assert results.short_answer("exp1", exp1.assign(did_train=False)) == "Not shown."
    assert results.short_answer("exp2", exp2) == "No."
    assert results.short_answer("exp2", exp2[exp2["seed"] < 3]) == "Not shown."
    bangla = runs.stored_records("bangla")
    told = results.short_answer("bangla", bangla, tmp_path)
    assert told == f"Yes, but {eight}; of longer training no record ships."
    few = bangla[(bangla["model"] != "fixed-at-E") | (bangla["seed"] < 3)]
    assert "not shown to be better than eight" in results.short_answer("bangla", few)


@pytest.mark.parametrize("seeds, told", [(6, "after longer training too"), (3, "open after longer training")])
def test_what_becomes_of_an_answer_after_longer_training(monkeypatch, moved, seeds, told):
    long = moved(runs.stored_records("exp1-long"), "mor", 0.7)
    long = long[long["seed"] < seeds]
    monkeypatch.setattr(headlines, "stored_records", lambda name, folder=None: long)
    assert told in results.short_answer("exp1", runs.stored_records("exp1"))


def test_worse_by_less_than_the_margin_is_equal_and_better_by_less_is_better(moved):
    exp2 = runs.stored_records("exp2")
    less = results.compare(exp2, "mor-source-protocol", "fixed-long")
    more = results.compare(exp2, "fixed-long", "mor-source-protocol")
    assert stats.judged(less) == "equal" and stats.judged(more) == "better"
    assert (
        stats.judged(results.compare(exp2.assign(did_train=False), "fixed-long", "fixed-shallow")) == "open"
    )
    assert results.short_answer("exp2", moved(exp2, "mor-equal-epochs", 2.0)) == "Yes."


def test_what_depth_is_worth_and_who_gets_more_of_it(moved):
    tables = [results.long_records(name) for name in ("exp1", "exp1-thin")]
    worth = [results.compare(t, "fixed-deep", "fixed-shallow")["mean"] for t in tables]
    start, end = (
        f"{' and '.join(map(results.signed, worth))} points at width 64 and 32; MoR is ",
        " than fixed layers of its cost.",
    )
    assert results.short_depth(tables) == f"{start}no better{end}"
    assert results.short_depth([*tables, runs.stored_records("exp2-long")]) == f"{start}no better{end}"
    one = [tables[0], moved(tables[1], "mor", 2.0)]
    assert results.short_depth(one) == f"{start}not always better{end}"
    both = [moved(t, "mor", 2.0) for t in tables]
    assert results.short_depth(both) == f"{start}better{end}"
    few = [t[t["seed"] < 3] for t in both]
    means = [results.compare(t, "fixed-deep", "fixed-shallow")["mean"] for t in few]
    shown = " and ".join(f"{results.signed(mean)} (not shown)" for mean in means)
    told = f"{shown} points at width 64 and 32; MoR is not shown to be better"
    assert results.short_depth(few) == f"{told}{end}"
    assert results.short_depth([]) == ""


def test_where_counting_is_ahead_is_said_once():
    stored = {name: runs.stored_records(name) for name in ("exp1", "exp2")}
    told = results.early_line(stored)
    assert told.startswith("After 6 epochs a table that counts ")
    assert told.endswith(
        "on Tiny Shakespeare 49.3 against 43.8 %, on half of Tiny Shakespeare 50.8 against 44.9 %."
    )
    assert "on Tiny" not in results.early_line(stored | dict(exp1=stored["exp1"].assign(accuracy=99.0)))
    assert results.early_line({"exp1": stored["exp1"].assign(accuracy=99.0)}) == ""


def test_the_first_picture_s_caption_is_of_its_fixed_models():
    fixed = runs.stored_records("pareto")
    fixed = fixed[fixed["model"] == "fixed 12"]
    assert f"twelve {fixed['accuracy'].mean():.1f} %." in report.front_caption()
    assert "width 64, 6 epochs, three seeds" in report.front_caption()


@pytest.mark.parametrize(
    "changes, who",
    [
        (dict(routing="none"), "every token"),
        (dict(target_depth=8.0), "every token in 7, the router's choice in 5"),
        (dict(target_depth=6.0, routing="frozen"), "every token in 5, an untrained router's choice in 7"),
        (dict(target_depth=None), "the router's choice"),
        (dict(target_depth=14.0), "the router's choice"),
        (dict(target_depth=8.0, routing="random"), "a blind choice"),
    ],
)
def test_the_table_of_models_says_in_how_many_layers_there_is_a_choice(changes, who):
    assert tables.who_runs(morlib.ModelConfig(vocab_size=9, **changes)) == who


def test_numbers_in_markdown_have_minus_signs():
    table = pd.DataFrame({"whole": [-5, 3], "part": [-0.25, 1.0], "text": ["a-b", "c"], "yes": [True, False]})
    assert "| \u22125 | \u22120.25 | a-b | True |" in tables.markdown(table)


def test_a_page_begins_with_links_to_its_sections():
    told = report.contents(["How to read", "## Does it, or not?", "text", "## And: more\n\nwords"])
    assert told == "- [Does it, or not?](#does-it-or-not)\n- [And: more](#and-more)"


@pytest.mark.parametrize("seeds", [1, 2])
def test_of_few_seeds_that_train_long_it_is_said_that_they_are_too_few(seeds, monkeypatch):
    long = runs.stored_records("bangla-long")
    long = long[long["seed"] < seeds]
    monkeypatch.setattr(headlines, "stored_records", lambda name, folder=None: long)
    told = results.headlines.trained_longer("bangla", runs.stored_records("bangla"))
    ship = ("one", "two")[seeds - 1]
    assert f"{ship} of six seeds ship, too few to say: MoR is 0.59 points below twelve layers" in told
