"""The tasks of known depth by their names."""

from __future__ import annotations

import re
from functools import lru_cache

from .chains import Chains
from .drawn import Drawn
from .known_depth import Hops

TASKS = {"hops": Hops, "chains": Chains}


@lru_cache(maxsize=8)
def made(name: str) -> Drawn | None:
    """The task that a name stands for: "hops-8-6" (symbols, most hops), "chains-4-5" (chains, deepest).

    None for another name. Raises ValueError if there is no task of that size.
    """
    match = re.fullmatch(rf"({'|'.join(TASKS)})-(\d+)-(\d+)", name)
    return TASKS[match[1]](int(match[2]), int(match[3])) if match else None
