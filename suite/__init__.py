"""What the notebooks need around morlib, a room a question: texts, runs, results, routing, cost, field."""

from importlib.metadata import PackageNotFoundError, version

# The oldest releases that the tests were run with; requirements.txt pins newer ones.
OLDEST = {
    "torch": "2.10",
    "numpy": "1.26",
    "scipy": "1.15",
    "pandas": "2.1",
    "matplotlib": "3.7",
    "sentencepiece": "0.2.0",
    "safetensors": "0.4.3",
    "joblib": "1.3",
    "filelock": "3.13",
    "tqdm": "4.66",
}


def check_versions(oldest: dict[str, str]) -> None:
    """Raises ImportError that names the packages which are missing or too old, and how to get them."""

    def numbers(text: str) -> list[int]:
        parts = text.split("+")[0].split(".")
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in parts]

    wrong = []
    for package, least in oldest.items():
        try:
            have = version(package)
        except PackageNotFoundError:
            have = "not installed"
        if have == "not installed" or numbers(have) < numbers(least):
            wrong.append(f"{package} {least} or newer ({have})")
    if wrong:
        names = " ".join(text.split()[0] for text in wrong)
        raise ImportError(f"this suite needs {', '.join(wrong)}: pip install --upgrade {names}")


check_versions(OLDEST)
