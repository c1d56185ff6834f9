"""How runs are set up, trained, found again and kept."""

from .device import keep_memory, pick_device
from .experiments import (
    LONG,
    PAIRS,
    STUDIES,
    TEXTS,
    Run,
    bangla_models,
    depth_worth_runs,
    exp1_models,
    exp2_models,
    experiment_runs,
    front_controls,
    long_controls,
    long_runs,
    random_controls,
    study_runs,
    text_of,
    vocabulary_runs,
    worth_runs,
)
from .known_depth import (
    NARROW,
    chains_runs,
    deep_runs,
    four_wide_runs,
    front_runs,
    known_depth_models,
    known_depth_runs,
    map_runs,
    narrow_runs,
    rate_runs,
    size_of,
    wide_front_runs,
    wsd_runs,
)
from .leads import deep_lead_runs, lead_runs
from .records import (
    check_one_kind,
    evaluate_following,
    read_record,
    run_id,
    stored_records,
    table_of,
)
from .runner import go_on, run, run_all, trained_model
from .settings import OWN_TEXT, Settings, settings
from .whole_tokens import ByKind, WholeTokens
