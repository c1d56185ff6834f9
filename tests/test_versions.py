"""Libraries that are too old, or not there, are named with what to do."""

import re

import pytest

import suite
from suite import files


def test_libraries_that_are_too_old_or_missing_are_named():
    with pytest.raises(ImportError) as told:
        suite.check_versions({"torch": "999.1", "no-such-library": "1.0", "numpy": "1.0"})
    assert str(told.value).startswith("this suite needs torch 999.1 or newer (2.")
    assert str(told.value).endswith(
        "no-such-library 1.0 or newer (not installed): pip install --upgrade torch no-such-library"
    )


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
