"""Print the tables of the stored records into the README: `make report`."""

from pathlib import Path

import pandas as pd

import morlib

START, END = "<!-- results: printed by `make report` -->", "<!-- end of results -->"
EXPERIMENTS = {
    "exp1": ("Experiment 1: efficiency", [("mor", "fixed-deep"), ("mor", "fixed-at-E"), ("mor", "random"), ("mor", "frozen")]),
    "exp2": ("Experiment 2: equal cost", [("mor-source-protocol", "fixed-shallow"), ("mor-equal-epochs", "fixed-shallow"),
                                          ("mor-equal-compute", "fixed-shallow"), ("mor-equal-epochs", "random")]),
    "bangla": ("Experiment 3: Bangla", [("mor-deep", "fixed-deep"), ("mor-half", "fixed-shallow")]),
}  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown, the index first."""
    rows = [[table.index.name or "", *table.columns], ["---"] * (len(table.columns) + 1), *([i, *row] for i, row in zip(table.index, table.values))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def results_section() -> str:
    """One table an experiment, with its settings."""
    parts = []
    for experiment, (title, pairs) in EXPERIMENTS.items():
        records = morlib.stored_records(experiment)
        if len(records):
            first = records.iloc[0]
            parts.append(f"**{title}** ({first['data']}, preset {first['preset']}, recipe {first['recipe']}, {first['record']['device']})")
            parts.append(markdown(morlib.summary(records)))
            parts.append("\n".join(f"- {line}" for line in morlib.answers(records, pairs)))
    findings = morlib.ROOT / "outputs" / "reference" / "routing_findings.csv"
    if findings.is_file():
        correlation = pd.read_csv(findings).groupby("model", sort=False)["correlation"].agg(["mean", "min", "max", "count"])
        parts.append("**Does depth follow difficulty?** Rank correlation of a token's depth with the surprisal of what follows, over seeds")
        parts.append(markdown(correlation.round(3).astype({"count": str}).rename(columns={"count": "seeds"})))
    return "\n\n".join(parts) or "No records yet."


def update_readme(path: Path = morlib.ROOT / "README.md") -> None:
    before, rest = path.read_text(encoding="utf-8").split(START)
    morlib.write_whole(path, f"{before}{START}\n\n{results_section()}\n\n{END}{rest.split(END)[1]}".encode())


if __name__ == "__main__":
    update_readme()
