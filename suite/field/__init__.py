"""Other systems of the field, one file each, on this suite's backbone. Importing the room registers them."""

from . import act, dr, exits, lora, mod, moe, mor, ponder, sliced
from .models import (
    QUICK,
    SMALL,
    field_models,
    field_runs,
    field_size,
    text_models,
    text_runs,
    wide_field_runs,
)
from .run_per_hop import recursion_runs
from .told import Told, told_runs
from .trials import AHEAD_ON_TEXT, long_trial_runs, text_trial_runs, trial_runs
