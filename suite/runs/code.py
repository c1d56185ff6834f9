"""What a policy of the user's own computes, as a digest: so that an edited one is another run."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import morlib

from ..files import sha256

PLAIN = (bool, int, float, complex, str, bytes, types.NoneType)


def ships(thing) -> bool:
    """Whether a class or function is part of the suite or of torch."""
    return (thing.__module__ or "builtins").split(".")[0] in ("morlib", "suite", "torch", "builtins")


def code_of(routing: str) -> str:
    """A digest of the code of a policy that a user registered; of one that ships, its version.

    It covers methods, plain attributes and bases, and the user's functions, classes, modules and plain values
    that they name. Comments and empty lines do not count; another version of Python may.
    """
    policy = morlib.POLICIES[routing]
    return policy.version if ships(policy) else sha256(repr(described(policy, set())).encode())[:12]


def described(thing, seen: set) -> object:
    """What identifies a plain value, or the user's code. Of anything else its name. seen: ids of what was."""
    if isinstance(thing, PLAIN):
        return thing
    if isinstance(thing, (np.generic, np.ndarray, torch.Tensor)):
        return described(thing.tolist(), seen)
    if isinstance(thing, (functools.partial, functools.partialmethod)):
        return described([thing.func, thing.args, thing.keywords], seen)
    if isinstance(thing, (list, tuple)):
        return [described(item, seen) for item in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted(repr(described(item, seen)) for item in thing)
    if isinstance(thing, dict):
        return [[described(key, seen), described(value, seen)] for key, value in thing.items()]
    if isinstance(thing, types.CodeType):
        return [thing.co_name, thing.co_code.hex(), list(thing.co_names), described(thing.co_consts, seen)]
    if isinstance(thing, cached_property):
        return described(thing.func, seen)
    if isinstance(thing, property):
        return [described(part, seen) for part in (thing.fget, thing.fset)]
    thing = getattr(thing, "__func__", thing)  # a class or static method's function
    thing = thing.__wrapped__ if isinstance(thing, functools._lru_cache_wrapper) else thing
    name = getattr(thing, "__name__", type(thing).__name__)  # __qualname__ differs in workers
    an_object = not isinstance(thing, (types.FunctionType, types.ModuleType, type))
    if an_object and not (hasattr(thing, "__dict__") and is_the_users(type(thing))):
        return name
    if id(thing) in seen or not is_the_users(thing):
        return name
    seen.add(id(thing))
    if an_object:
        return [name, described([type(thing), vars(thing)], seen)]
    if isinstance(thing, types.ModuleType):
        return [name, sha256(Path(thing.__file__).read_bytes())]
    return [name, (parts_of_class if isinstance(thing, type) else parts_of_function)(thing, seen)]


def parts_of_function(function: types.FunctionType, seen: set) -> list:
    """Its code, its defaults, and the values of the names that it takes from around it."""
    code, known = function.__code__, function.__globals__
    outer = {name: known[name] for name in sorted(globals_in(code)) if name in known}
    cells = zip(code.co_freevars, function.__closure__ or ())
    outer |= {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    return described([code, function.__defaults__, function.__kwdefaults__, outer], seen)


def parts_of_class(kind: type, seen: set) -> list:
    own = {k: v for k, v in vars(kind).items() if not k.startswith("__") or isinstance(v, types.FunctionType)}
    versions = [vars(base).get("version", "") for base in kind.__mro__]  # also of bases that ship
    return described([sorted(own.items(), key=lambda item: item[0]), kind.__bases__, versions], seen)


def globals_in(code: types.CodeType) -> set[str]:
    """The names that code, and functions inside of it, read from their module."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_in(part) for part in code.co_consts if isinstance(part, types.CodeType)))


def is_the_users(thing) -> bool:
    """Whether a class, function or module comes neither with the suite nor from an installed package."""
    of_module = isinstance(thing, types.ModuleType)
    name = thing.__name__ if of_module else thing.__module__ or "builtins"
    if name == "__main__" and not of_module:
        return True  # in a worker too, where it comes from another process
    if name.split(".")[0] in ("morlib", "suite", "torch", "builtins"):
        return False
    path = getattr(thing if of_module else sys.modules.get(name), "__file__", None)
    if path is None:  # typed in, or built in
        return not of_module
    homes = [sysconfig.get_path(home) for home in ("stdlib", "purelib", "platlib")]
    return not any(Path(path).is_relative_to(home) for home in homes)
