"""A saved model goes on with a prompt: `python -m suite.texts.write MODEL --prompt "ROMEO:"`.

This file is the command. The function `texts.write` is in writing.py; do not import this module beside it.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .models import load_model
from .writing import write


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m suite.texts.write", description=__doc__.split(":")[0] + ".")
    parser.add_argument("model", help="a file that texts.save_model wrote")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    tokens = dict(dest="n", metavar="TOKENS", type=int, default=200)
    parser.add_argument("--tokens", **tokens, help="how many tokens to write (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    parser.add_argument("--seed", type=int, default=0, help="one seed gives one text (0)")
    parser.add_argument("--top-k", type=int, help="sample among so many of the likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that make up this share")
    parser.add_argument("--stop", action="append", default=[], help="end before this string; may be repeated")
    modules = dict(dest="modules", metavar="MODULE", action="append", default=[])
    parser.add_argument("--import", **modules, help="adds policies, as suite.field does; may be repeated")
    given = vars(parser.parse_args(arguments))
    try:
        for module in given.pop("modules"):
            importlib.import_module(module)
        write(*load_model(given.pop("model")), **given, stream=True)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
