"""The stored records as text: RESULTS.md and the README's answers, printed by `make report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from . import cost, results, routing
from .files import REFERENCE, ROOT, write_whole
from .results.tables import count, markdown
from .routing.answers import sentence as difficulty_sentence
from .routing.answers import short as short_difficulty
from .routing.findings import FILE as ROUTING_FINDINGS
from .runs import PAIRS, stored_records

START, END = "<!-- results -->", "<!-- end of results -->"
BOOKS = {"exp1": "02_exp1_efficiency", "exp2": "03_exp2_equal_cost", "bangla": "04_bangla"}
READ = "What do the models read, and how far does counting get?"
QUESTIONS = {
    "exp1": "Does MoR keep accuracy while it computes less?",
    "exp2": "Is MoR better than a fixed-depth Transformer of equal cost?",
    "bangla": "Does MoR keep accuracy in Bangla too?",
}
DEPTH = "What is depth worth to models that train longer, and how much of it does MoR get?"
LONG_SENTENCES = (results.gate_sentence, results.depth_sentence, results.kinds_sentence)
KNOWN = "Where depth is known to matter, does a router find it?"
DIFFICULTY = "Does its depth follow token difficulty?"
SYSTEMS = "Which system of the field is ahead of fixed depth at equal operations?"
TIME = "Is skipped work saved time?"
FIELD = "Which other system of the field finds depth where it matters?"
FIELD_WIDE = "Systems of the field among six layers, in the wide setting"
FIELD_TEXT = "Systems of the field on text, where depth is worth little"
FRONT = "![Loss and accuracy against effective depth](outputs/reference/front.png)"
HOPS = (
    "![Accuracy by the number of hops, and who is deep](outputs/reference/known_depth.png)\n"
    "The task of known depth: right answers by the number of hops, and how deep tokens of each kind are."
)
CHOICES = (
    "Which to choose, by what matters, without the plan, the controls, what trains on from a model of the "
    "table, routers that chose nothing in a seed, and rows of one seed:"
)
COLOURED = "A [text coloured by depth](outputs/reference/routing_text.html), to be opened in a browser."
UNITS = (
    "The answers, each with the notebook that asks. *Kept* and *no better* are judged to half a point; cost "
    "is how often blocks are applied, not seconds. RESULTS gives differences their intervals: [at a "
    "glance](RESULTS.md#at-a-glance), and in the sections after it."
)
INTRODUCTION = """# Results

Printed by `make report` from the records in [outputs/reference](outputs/reference): one JSON file a
run, with its configuration, seed, hash of the text, versions and device. Do not edit this page by hand.

How to read the tables:

- **Accuracy** is how often the likeliest next token is right, in per cent, on held-out text, which no
  training window touched. **Loss** is in nats a token, **bits per byte** does not depend on the
  vocabulary.
- **E**, the effective depth, is how often blocks ran for a token on average, counted from what ran. **E
  sampled** is the same with actions drawn as in training.
- **Models**: *fixed-deep* has all layers, *fixed-shallow* half of them. *fixed-at-E* has as many as MoR
  runs on average. *random* skips blindly, as often at each layer as MoR does. *frozen* has a router that
  never learns. *worth* is token worth. *-deep* and *-half* say which depth MoR and its controls are held to.
  *fixed-shared* uses half as many blocks twice each. *fixed-long* is the fixed model of equal cost,
  trained for 5/3 of the epochs as the sources train MoR. *mor-equal-compute* is the very run of
  *mor-equal-epochs*: at half of the layers they are one. At width 32 a third of the tokens runs all
  layers, the others half of them: a new third each time (*blind-tokens*), a third that token worth learns
  (*worth-above*), kinds of tokens or positions that lots chose once (*by-kind*, *by-position*), or those
  after three characters where depth pays (*told*). In *-sees-all* they see the keys of all tokens.
- **Brackets** hold the 95 % interval of a mean over seeds (Student's t). **A new seed** is where one
  more run is expected (95 %), and so wider.
- **Comparisons** are over paired seeds: models of one seed see the same text in the same order (but for
  those with twice the steps), and those of equal depth with blocks of their own start from the same
  weights. *Higher* or *lower* needs a 95 % interval without zero and a sign-flip test that agrees (p below
  0.05). *Equal within* a margin needs a 90 % interval inside it, as two one-sided t tests at 5 % do. *Loss*
  beside points is the same difference in held-out loss, *better* (lower) or *worse* where interval and
  sign-flip test agree. Under six seeds nothing is claimed: the studies, with three seeds a row or ten,
  suggest. *42 to 78 %* are the lowest and the highest of fewer than six seeds.
- **Nothing is corrected for the number of comparisons**: of thirty without any difference about one would
  be called one. With six seeds the sign-flip test cannot give less than p = 0.03, so by that test no claim
  here would survive a correction.
- **Cost** is how often blocks are applied, not seconds: *applications* are those of a whole training, in
  millions. *A third less computation* and *equal cost* mean these.
- **Known depth**: *way* compares losses: how far a model is below half of the layers at the same seeds,
  in per cent of what all layers gain there. *Solved* counts the seeds that are right at 99 % or more
  of the hard answers of each k.
- **The field**: six seeds show that a system is ahead of fixed depth if interval and test say so, as above;
  two to five if each is ahead, which is a hint and no proof. Systems with six seeds were chosen by their
  first three, which count among the six. *Depth follows hops* (or *surprisal*) is a rank correlation.
  *Collapsed* counts the seeds in which a router came to choose nothing, so that each layer runs all tokens
  or none.
- **Training (s)** is the clock of that run, one thread, beside another run: read it with care.
- **Beats its table**: a held-out loss below what a table of pairs of tokens reaches; of models that train
  long, below that of the best table of counts.
- These are small models, trained briefly. What holds here need not hold at another size.
"""


def results_page() -> str:
    """The whole of RESULTS.md."""
    parts = [INTRODUCTION.strip(), *glance(), *experiments(), *known_depth(), *field(), *studies(), *speed()]
    parts += [*growth(), *difficulty()]
    return "\n\n".join([parts[0], contents(parts), *parts[1:]]) + "\n"


def contents(parts: list[str]) -> str:
    """A list of links to the sections of a page, given its parts in Markdown."""
    titles = [part.removeprefix("## ").splitlines()[0] for part in parts if part.startswith("## ")]
    kept = ["".join(c for c in title.lower() if c.isalnum() or c in " -") for title in titles]
    return "\n".join(f"- [{title}](#{link.replace(' ', '-')})" for title, link in zip(titles, kept))


def readme_part() -> str:
    """The README's answers, without their intervals, and two pictures."""
    stored = {name: stored_records(name) for name in BOOKS}
    stored = {name: records for name, records in stored.items() if len(records)}
    tables = [*map(results.long_records, ("exp1", "exp1-thin"))]
    lines = [bullet("01_data", READ, "", results.early_line(stored))] if stored else []
    for experiment, records in stored.items():
        told = results.protocol_sentence(records) if experiment == "exp2" else ""
        short = results.short_answer(experiment, records)
        lines.append(bullet(BOOKS[experiment], QUESTIONS[experiment], short, told))
        if experiment == "exp1" and (worth := results.short_depth(tables)):
            lines.append(bullet(BOOKS[experiment], DEPTH, worth))
    if subjects := stored_subjects():
        told = f"{difficulty_sentence(subjects)} {COLOURED}"
        lines.append(bullet("05_routing_analysis", DIFFICULTY, short_difficulty(subjects), told))
    for record in cost.speed_records():
        lines.append(bullet("06_deployment", TIME, cost.short(record), cost.training_sentence(record)))
    known = results.main_records()
    if results.answerable(known):
        front = results.front_records()
        told = [results.known_depth_answer(known), results.weakest_sentence(front)]
        told += [results.second_sentence(front, known), results.text_sentence()]
        told = " ".join(filter(None, told))
        lines.append(bullet("07_known_depth", KNOWN, results.short_known(known), told))
    fields = results.stored_field(), results.stored_text_field()
    if short := results.short_field(*fields, costs := cost.stored_systems()):
        told = f"{results.second_lead_sentence(costs)} There stands which to choose when.".strip()
        lines.append(bullet("08_field", SYSTEMS, short, told))
    text = results.without_intervals("\n".join(lines)) or "No records yet."
    on_text, on_known = results.text_table(), results.settings_table()
    parts = [results.in_short(known, tables)]
    if len(on_text):
        parts += [f"{FRONT}\n{front_caption()} {results.CAPTION_ON_TEXT}", markdown(on_text)]
    if len(on_known):
        parts += [f"{HOPS} {results.CAPTION}", markdown(on_known)]
    return "\n\n".join(filter(None, [*parts, UNITS, text]))


def bullet(notebook: str, question: str, short: str, told: str = "") -> str:
    """One of the README's answers: a link to the notebook, the question, the answer in a few words, and more
    on it."""
    link = f"- [{notebook[:2]}](notebooks/{notebook}.ipynb)"
    return " ".join(filter(None, (link, f"*{question}*", short and f"**{short}**", told)))


def front_caption() -> str:
    """What the first picture shows, and how flat fixed depth is in it; nothing without its records."""
    records = stored_records("pareto")
    fixed = records[records["model"].str.startswith("fixed")] if len(records) else records
    if fixed.empty:
        return ""
    mean = fixed.groupby("effective_depth")["accuracy"].mean()
    (few, least), (many, most) = ((count(round(n)), mean[n]) for n in (mean.index[0], mean.index[-1]))
    seeds = count(fixed["seed"].nunique())
    told = (
        f"{few.capitalize()} fixed layers guess {least:.1f} % of the next tokens right, {many} {most:.1f} %."
    )
    return f"Text: {results.glance.setting(fixed)}, {seeds} seeds. {told}"


def stored_subjects() -> list:
    """What the routing findings that ship are about; empty where none ship."""
    return routing.stored_subjects() if (REFERENCE / ROUTING_FINDINGS).is_file() else []


def lines_of(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def about(records: pd.DataFrame) -> str:
    """The settings of some records in a line."""
    first = records.iloc[0]
    version, device = first["record"]["versions"]["morlib"].split("+")[0], first["record"]["device"]
    kind = f"preset {first['preset']}, recipe {first['recipe']}, morlib {version}"
    return f"*{first['data']}, {records['seed'].nunique()} seeds, {kind}, {device}*"


# ---- Parts of the page ----


def glance() -> list[str]:
    """The comparisons on which the answers rest, a table a text."""
    table = results.glance_table()
    told = "Differences in points of accuracy; on hops-8-6 of the hard questions of 4 to 6 hops."
    parts = ["## At a glance", told] if len(table) else []
    texts = table["setting"].map(lambda setting: setting.partition(", width")[0])
    for text, rows in table.groupby(texts, sort=False):
        rest = rows["setting"].str.removeprefix(f"{text}, ")
        parts += [f"*{text}*", markdown(rows.assign(setting=rest).reset_index(drop=True))]
    return parts


def experiments() -> list[str]:
    """Of each experiment: its answer, the models, and the comparisons."""
    parts = []
    for number, (experiment, question) in enumerate(QUESTIONS.items(), 1):
        records = stored_records(experiment)
        if records.empty:
            continue
        parts += [f"## Experiment {number}: {question}", about(records)]
        parts += [
            results.sentence(experiment, records) + results.early_sentence(experiment, records),
            markdown(results.summary(records)),
        ]
        parts += ["Differences in points of accuracy:"]
        parts += [markdown(results.comparisons(records, PAIRS[experiment]))]
        if experiment == "bangla":
            bits = results.comparisons(records, PAIRS[experiment], "bits_per_byte", margin=0.01)
            parts += ["Differences in bits per byte (lower is better):", markdown(bits)]
        for long in (experiment, f"{experiment}-thin"):
            parts += trained_long(long) if long in results.TEXT_NAMES else []
    return parts


def trained_long(experiment: str) -> list[str]:
    """What the models of an experiment reach when they train long, where such records ship."""
    records = results.long_records(experiment)
    if not results.depth_sentence(experiment):
        return []
    return [
        f"### Trained long: {results.TEXT_NAMES[experiment]}",
        about(records),
        " ".join(filter(None, (sentence(experiment) for sentence in LONG_SENTENCES))),
        markdown(results.summary(records)),
        markdown(results.comparisons(records, results.long_pairs(experiment) + results.WHO_PAIRS)),
        *(
            ["By length of training, width and context:", markdown(results.worth_of_depth().reset_index())]
            if experiment == "exp1"
            else []
        ),
    ]


def known_depth() -> list[str]:
    """The task of known depth: models, rates, depths, goals, what was tried; and the same on text."""
    records = results.main_records()
    if not results.answerable(records):
        return []
    dial, front = results.stored_table(results.DIAL), results.front_records()
    return [
        *(f"## {KNOWN}", about(records), results.hops_sentence(records)),
        *(results.CAPTION, markdown(results.settings_table())),
        *("Hard answers right (%), by the number of hops k:", markdown(results.hops_table(records))),
        *("Mean over the upper half of k, in points:", markdown(results.hops_verdicts(records))),
        "### Other learning rates, and depths\n\nAt twice the learning rate:",
        markdown(results.hops_table(stored_records("rates"))),
        *("At four times:", markdown(results.hops_table(stored_records("rates-4")))),
        f"{results.again_sentence(front)} {results.second_sentence(front, records)}".strip(),
        *setting("A learning rate that stays high", stored_records("known-depth-wsd")),
        *setting("The wide setting: six layers of width 64", stored_records("known-depth")),
        *fewer_layers(),
        *setting("Four wide layers, and a rate that stays high", stored_records("known-depth-4")),
        *harder(),
        *goals_reached(),
        "### Accuracy against depth\n\nIn the narrow setting, held to other depths too; hard answers right "
        "at the upper half of k:",
        markdown(results.known_front_table(front)),
        f"{results.less_depth_sentence(front)} Depth at x by the number of hops, in brackets how many of the "
        "hard questions are right (%):",
        markdown(results.who_is_deep(front).reset_index()),
        *setting("A task of another kind: chains of k assignments to follow", stored_records("chains")),
        "### Fixed depth by steps of training\n\nOn hops-8-6 at width 64:",
        markdown(results.map_table(results.map_records())),
        f"### Held to other depths after training\n\n{results.dial_sentence(dial)}",
        markdown(results.dial_table(dial)),
        *text_dial(),
        "### How the router learns: what was tried\n\nToken worth with one change at a time, in the narrow "
        "setting at half of its steps, one seed; last, the mean depth of each kind of token:",
        markdown(results.leads_table(stored_records("leads"))),
        *worth_measured(),
        *recursion(),
        *worth_on_text(),
    ]


def goals_reached() -> list[str]:
    """What token worth should reach in each setting, a table a router that has records."""
    goals = results.known_goals(results.known_settings())
    told = f"### What token worth should reach, and what it does\n\n{results.known_goals_sentence(goals)}."
    routers = [router for router in results.ROUTERS if (goals["router"] == router).any()]
    return [told, *(markdown(results.goals_side_by_side(goals, r).reset_index()) for r in routers)]


def worth_on_text() -> list[str]:
    """Token worth on text, and what a router should reach there; nothing without records."""
    told = results.text_sentence()
    if not told:
        return []
    return [
        f"### Token worth on text\n\n{told} In points of accuracy:",
        markdown(results.comparisons(results.worth_on_text("exp2"), results.TEXT_PAIRS)),
        "What a router should reach on text, trained long, in points of accuracy (90 % interval; where it "
        "should be ahead, 95 %):",
        markdown(results.text_goals().reset_index()),
    ]


def setting(title: str, records: pd.DataFrame) -> list[str]:
    """A section on one more setting of the task: its models and verdicts; nothing without records."""
    if not results.answerable(records):
        return []
    return [
        f"### {title}",
        *(markdown(table(records)) for table in (results.hops_table, results.hops_verdicts)),
    ]


def fewer_layers() -> list[str]:
    """The wide setting with fewer layers for less depth, where such records ship."""
    records = results.wide_front_records()
    if records.empty:
        return []
    told = "Fewer layers for less depth; beside them the other models, at the same seeds as far as they ran:"
    verdicts = results.hops_verdicts(records, "worth-shallow")
    return [told, markdown(results.hops_table(records)), markdown(verdicts)]


def harder() -> list[str]:
    """Twelve layers on a harder task of the same kind, where such records ship."""
    records = results.deep_records()
    if records.empty:
        return []
    parts = setting("A harder task: twelve layers", records)
    dial, leads = results.stored_table(results.DEEP_DIAL), stored_records("known-depth-12-leads")
    if len(dial):
        parts += ["Token worth, held to other depths after training:", markdown(results.dial_table(dial))]
    if len(leads):
        table = results.early_table(pd.concat([records, leads], ignore_index=True))
        parts += [
            "Validation loss on the way, with one change at a time (the changes at one seed of their own, "
            "most of them stopped early):",
            markdown(table),
        ]
    return parts


def worth_measured() -> list[str]:
    """How far what training measures is from what skipping a token costs, where the table ships."""
    table = results.stored_table(results.WORTH_MEASURED)
    if table.empty:
        return []
    told = "What it costs to skip a token, to give it weight 0, and what is measured while exploring:"
    return [told, markdown(results.worth_table(table))]


def text_dial() -> list[str]:
    """Models of text that are held to other depths after training, where their table ships."""
    table = results.stored_table(results.TEXT_DIAL)
    records = results.long_records("exp1-thin")
    if table.empty or records.empty:
        return []
    shown = results.text_dial_table(table, records)
    told = f"On {results.TEXT_NAMES['exp1-thin']}, models held to other depths after training:"
    return [told, markdown(shown)]


def recursion() -> list[str]:
    """One block that is run once a hop, and more often than in training, where its table ships."""
    table = results.stored_table(results.RECURSION)
    if table.empty:
        return []
    told = f"### A block run more often than in training\n\n{results.recursion_sentence(table)}"
    return [told, markdown(results.recursion_table(table).reset_index())]


def field() -> list[str]:
    """Other systems of the field on the task of known depth, in two settings, and on text: the answer, the
    table, which to choose."""
    costs, parts = cost.stored_systems(), []
    known, wide, text = results.stored_field(), results.stored_wide_field(), results.stored_text_field()
    for title, records in ((FIELD, known), (FIELD_WIDE, wide), (FIELD_TEXT, text)):
        if len(records):
            told = results.field_sentence(records, costs)
            more = (results.second_lead_sentence, results.stays_high_sentence) if title == FIELD else ()
            told = " ".join([told, *filter(None, (sentence(costs) for sentence in more))])
            parts += [f"## {title}", about(records), told]
            parts += [markdown(results.field_table(records, costs))]
            parts += [] if title == FIELD_TEXT else [markdown(results.answers_table(records))]
            parts += ["Top-k in training, a decision a token in use:"]
            parts += [markdown(results.sampled_table(records, costs))]
            parts += [CHOICES, markdown(results.choices_table(records, costs))]
    return parts


STUDIES: dict[str, tuple[str, Callable]] = {  # its title, and what gives its table, or its text
    "pareto": (
        "The front: loss and accuracy against effective depth",
        lambda records: f"{FRONT}\n\n{lines_of(results.front_lines(records))}",
    ),
    "estimators": ("How the router learns: validation text, the best first", results.by_validation),
    "recursions": ("What recursing buys: validation text, the best first", results.by_validation),
    "collapse": ("Do routers collapse? Held-out text", results.collapse_table),
    "sources": (
        "What happened in the sources: held-out text",
        lambda records: results.summary(records.sort_values("model")),
    ),
    "vocabulary": (
        "Which vocabulary? Bangla, six fixed layers, held-out text: bits per byte",
        lambda records: results.bits_by_vocabulary(records).round(3),
    ),
}


def studies() -> list[str]:
    """Of each study: its settings and what it shows."""
    parts = []
    for study, (title, told) in STUDIES.items():
        records = stored_records(study)
        if len(records):
            shown = told(records)
            shown = shown if isinstance(shown, str) else markdown(shown)
            parts += [f"## {title}", about(records), shown]
    return parts


def speed() -> list[str]:
    """Ratios of times, from each stored record of the bench."""
    parts = []
    for record in cost.speed_records():
        table = cost.ratios(record).rename_axis("side by side, in one process")
        told = filter(None, (cost.short(record), cost.training_sentence(record)))
        parts += [f"## {TIME}", f"*{cost.about(record)}*", *told, markdown(table)]
    return parts


def growth() -> list[str]:
    """How cost grows, from each stored sweep, and the estimate that rests on it."""
    parts = []
    for record in cost.growth_records():
        parts += ["## How cost grows", f"*{cost.about(record)}*", lines_of(cost.findings(record))]
        parts += [markdown(cost.estimate(record)), cost.basis(record)]
    return parts


def difficulty() -> list[str]:
    """What the routing findings say of depth and difficulty."""
    subjects = stored_subjects()
    if not subjects:
        return []
    verdicts, gain = routing.verdict_table(subjects).reset_index(), results.stored_table(routing.GAIN)
    parts = ["## Does depth follow difficulty?", difficulty_sentence(subjects)]
    parts += ["Rank correlation of depth with difficulty (95 % interval over seeds):", markdown(verdicts)]
    if gain.empty:
        return parts
    parts += ["### Where depth pays", routing.gain_sentence(gain)]
    for what in ("accuracy", "loss"):
        parts += [f"Parts of the gain in {what} (%):", markdown(routing.gain_table(gain, what))]
    return parts


# ---- Writing ----


def update_readme(path: Path = ROOT / "README.md") -> None:
    """Put `readme_part` between the README's markers. Raises ValueError if it has not each of them once."""
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.name} must hold {START} and {END} once each")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    write_whole(path, f"{before}{START}\n{readme_part()}\n\n{END}{after}".encode())


def main() -> None:
    """Write RESULTS.md, the README's answers and their picture."""
    front = stored_records("pareto")
    if len(front):
        results.draw_front(front, sources=False).savefig(REFERENCE / "front.png", dpi=110)
    known = results.main_records()
    if results.answerable(known):
        results.draw_known_depth(known).savefig(REFERENCE / "known_depth.png", dpi=110, bbox_inches="tight")
    write_whole(ROOT / "RESULTS.md", results_page().encode())
    update_readme()


if __name__ == "__main__":
    main()
