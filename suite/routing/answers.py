"""The first thing a reader sees of notebook 05: one sentence, one table, one picture."""

from __future__ import annotations

import pandas as pd

from ..results import show, signed
from ..results.tables import in_seeds, span
from .difficulty import answer, mean_correlations
from .figures import depth_by_tenth
from .findings import Subject, rates, stored_findings, stored_subjects, verdicts
from .tables import verdict_table

LEADS = {
    "yes": "The router gives harder tokens more depth",
    "no": "The router is not shown to give harder tokens more depth",
    "open": "There are too few seeds to say whether the router gives harder tokens more depth",
    "mixed": "Whether the router gives harder tokens more depth depends on the text",
}
SHORT = {"yes": "Yes", "no": "No", "open": "Too few seeds to say", "mixed": "It depends on the text"}
ON_A_TEXT = {  # how an answer begins, and what it means for one text
    "no, depth falls": "on {text} they even get less",
    "no, a rise": "on {text} no such rise is shown",
    "no, what there is": "on {text} what there is goes with frequency and position",
    "no,": "on {text} a control shows as much",
    "yes, but only": "on {text} by which token was read",
    "yes,": "on {text} also among places that read the same token",
    "open": "on {text}",
}


def headline() -> None:
    """Show what the stored findings say of depth and difficulty."""
    if stored_findings() is None:
        print("No stored finding ships with this copy: run the notebook to make one.")
        return
    subjects = stored_subjects()
    show(sentence(subjects), verdict_table(subjects).reset_index(), origin(subjects))
    depth_by_tenth(rates(subjects))


def cases(subjects: list[Subject], measures: tuple[str, ...]) -> list[tuple[str, str, pd.DataFrame]]:
    """The verdict's correlations for each text and measure."""
    found = verdicts(subjects)
    of = found.groupby(["text", "measure"])
    return [(subject.name, measure, of.get_group((subject.name, measure))) for subject in subjects
            for measure in measures]  # fmt: skip


def kind_of_answer(subjects: list[Subject]) -> str:
    """What the texts say together of depth and entropy: "yes", "no", "open" (where one is), "mixed"."""
    kinds = {answer(part).split(",")[0] for _, _, part in cases(subjects, ("entropy",))}
    return "open" if "open" in kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def short(subjects: list[Subject]) -> str:
    """The answer in a word or two. Where a rise is not shown on some text, that is no "no"."""
    kind = kind_of_answer(subjects)
    open_on = any(answer(part).startswith("no, a rise") for _, _, part in cases(subjects, ("entropy",)))
    return "Not shown." if kind == "no" and open_on else f"{SHORT[kind]}."


def sentence(subjects: list[Subject]) -> str:
    """The answer in one sentence, in which the findings decide the words. Difficulty is entropy, since no
    router can know which token will come."""
    by_text = cases(subjects, ("entropy",))
    answers = [answer(part) for _, _, part in by_text]
    lead = LEADS[kind_of_answer(subjects)]
    parts = []
    for (name, _, part), said in zip(by_text, answers):
        words = next(words for begins, words in ON_A_TEXT.items() if said.startswith(begins)).format(
            text=name
        )
        mean, low, high = mean_correlations(part)["raw"]
        interval = "" if pd.isna(low) else f", 95 % interval {span(low, high)}"
        name_of_number = "" if parts else "rank correlation of depth with entropy "  # once is enough
        parts.append(f"{words} ({name_of_number}{signed(mean)}{interval})")
    seeds = min(part["seed"].nunique() for _, _, part in by_text)
    return f"{lead}: {', and '.join(parts)}; {in_seeds(seeds)}."


def origin(subjects: list[Subject]) -> str:
    """Where the numbers come from, and what the words mean."""
    made, config = stored_findings(), subjects[0].about["config"]["model"]
    return (
        "*Depth*: how often layers were run for a token. Difficulty is judged by a separate model that runs "
        f"all of its {config['n_layers']} layers for every token. *Entropy*: how unsure that model is before "
        "the next token comes. *Surprisal*: how unlikely it held the token that came. The columns hold rank "
        "correlations of depth with difficulty and their 95 % intervals over seeds. "
        f"{made['places']} held-out windows a text, {made['seeds']} seeds, models of width "
        f"{config['d_model']}, preset {made['preset']}, recipe {made['recipe']}."
    )
