"""Print the tables of the stored records into the README: `make report`."""

import json
import math
from pathlib import Path

import pandas as pd

import analysis
import bench
import morlib

START, END = "<!-- results: printed by `make report` -->", "<!-- end of results -->"
EXPERIMENTS = {"exp1": "Experiment 1: efficiency", "exp2": "Experiment 2: equal cost", "bangla": "Experiment 3: Bangla"}


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown, the index first."""
    rows = [[table.index.name or "", *table.columns], ["---"] * (len(table.columns) + 1), *table.itertuples()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


STUDIES = {
    "pareto": ("The front: held-out loss against effective depth",
               lambda r: "![Loss and accuracy against effective depth](outputs/reference/front.png)\n\n" + "\n".join(f"- {line}" for line in analysis.front_lines(r))),
    "estimators": ("How the router learns: validation text, the best first", lambda r: markdown(analysis.by_validation(r))),
    "recursions": ("What recursing buys", lambda r: markdown(analysis.by_validation(r))),
    "collapse": ("Do routers collapse?", lambda r: markdown(analysis.collapse_table(r))),
    "sources": ("What happened in the sources: held-out text", lambda r: markdown(analysis.sources_table(r))),
    "vocabulary": ("Which vocabulary? Bangla, six layers, held-out text", lambda r: markdown(analysis.vocabulary_table(r))),
}  # fmt: skip


def results_section() -> str:
    """One table an experiment, with its settings."""
    parts = []
    for experiment, title in EXPERIMENTS.items():
        records = morlib.stored_records(experiment)
        if len(records):
            first = records.iloc[0]
            version = first["record"]["versions"]["morlib"].split("+")[0]
            parts.append(f"**{title}** ({first['data']}, preset {first['preset']}, recipe {first['recipe']}, morlib {version}, {first['record']['device']})")
            parts.append(markdown(morlib.summary(records)))
            parts.append("\n".join(f"- {line}" for line in morlib.answers(records, morlib.PAIRS[experiment])))
    for study, (title, told) in STUDIES.items():
        records = morlib.stored_records(study)
        if len(records):
            first = records.iloc[0]
            parts.append(f"**{title}** ({first['data']}, preset {first['preset']}, recipe {first['recipe']}, {records['seed'].nunique()} seed(s))")
            parts.append(told(records))
    for record in bench.stored():
        told = bench.table(record).set_index("what").rename_axis("side by side, in one process")
        parts += [f"**Is skipped work saved time?** ({bench.about(record)})", markdown(told[["measured", "quartiles", "goal", "met", "E"]])]
    findings = morlib.ROOT / "outputs" / "reference" / "routing_findings.json"
    if findings.is_file():
        kept = json.loads(findings.read_text(encoding="utf-8"))
        lines = [f"- {text}, {measure}: {analysis.verdict(part)}" for text, found in kept["texts"].items()
                 for measure, part in pd.DataFrame(found["verdict"]).groupby("measure", sort=False)]  # fmt: skip
        parts += [f"**Does depth follow difficulty?** (preset {kept['preset']}, recipe {kept['recipe']}, {kept['seeds']} seeds, {kept['device']})", "\n".join(lines)]
    return "\n\n".join(parts) or "No records yet."


def cost_section(runs: int = 10_000) -> str:
    """What many runs cost, from the clocks of the stored records: one run at a time on each core."""
    records = [records for records in map(morlib.stored_records, EXPERIMENTS) if len(records)]
    if not records:
        return "No records yet."
    preset = (records := pd.concat(records))["preset"].mode()[0]
    seconds = records[records["preset"] == preset]["train_seconds"]
    mean, low, high = seconds.mean(), *seconds.quantile([0.05, 0.95])
    rows = []
    for place, cores, session in (("one laptop", 2, None), ("Kaggle, a CPU session of 12 hours", 4, 12), ("a cluster of 10 machines", 160, None)):
        hours = runs * mean / cores / 3600
        rows.append({"where": place, "cores": cores, "runs an hour": f"{3600 * cores / mean:,.0f}", f"{runs:,} runs": f"{hours:,.1f} hours",
                     "sessions": str(math.ceil(hours / session)) if session else "1"})  # fmt: skip
    told = (f"Preset {preset}, from {len(seconds)} stored records: a run trains for {mean:.0f} seconds of one core on average (nine in ten between {low:.0f} and {high:.0f}), "
            f"{runs:,} runs for {runs * mean / 3600:,.0f} core hours; the evaluations come on top.")  # fmt: skip
    return told + "\n\n" + markdown(pd.DataFrame(rows).set_index("where"))


SECTIONS = {(START, END): results_section, ("<!-- cost: printed by `make report` -->", "<!-- end of cost -->"): cost_section}


def update_readme(path: Path = morlib.ROOT / "README.md") -> None:
    text = path.read_text(encoding="utf-8")
    for (start, end), section in SECTIONS.items():
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{section()}\n\n{end}{rest.split(end)[1]}"
    morlib.write_whole(path, text.encode())


if __name__ == "__main__":
    update_readme()
    if len(front := morlib.stored_records("pareto")):
        analysis.draw_front(front).savefig(morlib.ROOT / "outputs" / "reference" / "front.png", dpi=110)
