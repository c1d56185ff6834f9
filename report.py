"""Print the tables of the stored records into the README: `make report`."""

from pathlib import Path

import pandas as pd

import morlib

START, END = "<!-- results: printed by `make report` -->", "<!-- end of results -->"
TITLES = {"exp1": "Experiment 1: efficiency", "exp2": "Experiment 2: equal cost", "bangla": "Experiment 3: Bangla"}


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown, the index first."""
    rows = [[table.index.name or "", *table.columns], ["---"] * (len(table.columns) + 1), *([i, *row] for i, row in zip(table.index, table.values))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def results_section() -> str:
    """One table an experiment, with its settings."""
    parts = []
    for experiment, title in TITLES.items():
        records = morlib.stored_records(experiment)
        if len(records):
            first = records.iloc[0]
            parts.append(f"**{title}** ({first['data']}, preset {first['preset']}, recipe {first['recipe']}, {first['record']['device']})\n\n{markdown(morlib.summary(records))}")
    return "\n\n".join(parts) or "No records yet."


def update_readme(path: Path = morlib.ROOT / "README.md") -> None:
    before, rest = path.read_text(encoding="utf-8").split(START)
    morlib.write_whole(path, f"{before}{START}\n\n{results_section()}\n\n{END}{rest.split(END)[1]}".encode())


if __name__ == "__main__":
    update_readme()
