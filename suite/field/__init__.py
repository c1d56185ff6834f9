"""Other systems of the field, one file each, on this suite's backbone. Importing the room registers them."""

from .act import AdaptiveComputation
from .exits import ConfidenceExit, DepthAdaptive
from .lora import Relaxed
from .mod import MixtureOfDepths, agreement
from .models import QUICK, field_models, field_runs, field_size, uptrained
from .moe import MixtureOfExperts, RecursionsOfExperts
from .mor import ExpertChoice, TokenChoice
from .ponder import PonderNet
from .sliced import Sliced
from .trials import trial_runs
