"""Libraries that are too old, or not there, are named with what to do."""

import re

import pytest

import suite
from suite import files


def test_what_is_installed_is_new_enough():
    suite.check_versions(suite.OLDEST)


@pytest.mark.parametrize("least, message", [("999.1", "torch 999.1 or newer .2"), ("2.0", None)])
def test_a_library_that_is_too_old_is_named(least, message):
    if message is None:
        suite.check_versions({"torch": least})
        return
    with pytest.raises(ImportError, match=f"{message}.*pip install --upgrade torch"):
        suite.check_versions({"torch": least})


def test_a_library_that_is_missing_is_named():
    with pytest.raises(ImportError, match="no-such-library 1.0 or newer .not installed.*pip install"):
        suite.check_versions({"no-such-library": "1.0", "torch": "2.0"})


def test_versions_compare_by_number():
    with pytest.raises(ImportError):
        suite.check_versions({"torch": "2.1000"})
    suite.check_versions({"torch": "2.9"})  # 2.13 is newer


def test_the_pins_are_not_older_than_the_oldest():
    pins = dict(
        re.findall(r"^([\w.-]+)==([\d.]+)", (files.ROOT / "requirements.txt").read_text(), flags=re.M)
    )
    for package, least in suite.OLDEST.items():
        assert [*map(int, pins[package].split("."))] >= [*map(int, least.split("."))], package
