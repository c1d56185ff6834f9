"""Other systems of the field, one file each, on this suite's backbone. Importing the room registers them."""

from .act import AdaptiveComputation
from .dr import DynamicRouting
from .exits import ConfidenceExit, DepthAdaptive
from .lora import Relaxed
from .mod import MixtureOfDepths
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
from .moe import MixtureOfExperts, RecursionsOfExperts
from .mor import ExpertChoice, TokenChoice
from .ponder import PonderNet
from .run_per_hop import RunPerHop, SharingRunPerHop, recursion_runs
from .sliced import Sliced
from .told import Told, told_runs
from .trials import AHEAD_ON_TEXT, long_trial_runs, text_trial_runs, trial_runs
