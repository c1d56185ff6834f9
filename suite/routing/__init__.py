"""What the router does: depth and difficulty, decisions overruled, and texts coloured by depth."""

from .answers import headline
from .bangla import (
    EXAMPLES,
    character_class,
    code_points,
    conjuncts_whole,
    cuts,
    kinds,
    script_shares,
    segmentation,
)
from .difficulty import groups
from .figures import (
    change_forest,
    correlation_forest,
    depth_by_tenth,
    depth_panels,
    formation_lines,
    layers_by_actions,
    stacked_variance,
    tokens_by_layers,
)
from .findings import (
    changes,
    checked,
    correlations,
    formation,
    layers,
    models,
    oracles,
    over_seeds,
    own_passage,
    passages,
    rates,
    save,
    save_page,
    stored_subjects,
    subjects,
    variance,
    verdicts,
)
from .gain import (
    GAIN,
    deep_contexts,
    draw_gain,
    gain_sentence,
    gain_table,
    measure_gain,
)
from .interventions import Planned, applications, forced, oracle, plans
from .tables import (
    change_table,
    ends,
    formation_table,
    model_table,
    oracle_table,
    variance_table,
    verdict_table,
)
from .textpage import fragment, page
