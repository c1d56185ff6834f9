"""What the records say: statistics, tables, figures, and each experiment's answer."""

from .dial import (
    DEEP_DIAL,
    DIAL,
    NARROW_DIAL,
    TEXT_DIAL,
    dial_sentence,
    dial_table,
    draw_dial,
    measure_dial,
    text_dial_table,
)
from .field import (
    answers_table,
    choices_table,
    field_headline,
    field_sentence,
    field_table,
    loss_against_operations,
    on_text_sentence,
    rows_of,
    sampled_table,
    second_lead_sentence,
    short_field,
    stays_high_sentence,
    stored_field,
    stored_text_field,
    stored_wide_field,
    trials_table,
    way_to_all_layers,
)
from .figures import (
    accuracy_against_depth,
    actions_by_layer,
    bangla_font,
    bars,
    draw_floors,
    draw_front,
    draw_vocabularies,
    figure_style,
    forest,
    heat_map,
    learning_curves,
    save_figure,
)
from .glance import CAPTION_ON_TEXT, glance_table, text_table, without_intervals
from .headlines import (
    TEXT_NAMES,
    early_line,
    early_sentence,
    headline,
    protocol_sentence,
    sentence,
    show,
    trained_longer,
)
from .known_depth import (
    TEXT_PAIRS,
    answerable,
    by_hops,
    deep_records,
    draw_known_depth,
    early_table,
    hops_curves,
    hops_sentence,
    hops_table,
    hops_verdicts,
    known_depth_answer,
    leads_table,
    main_records,
    map_records,
    map_table,
    narrow_records,
    plan_curves,
    text_sentence,
    worth_on_text,
)
from .known_front import (
    again_sentence,
    draw_known_front,
    front_records,
    known_front_table,
    less_depth_sentence,
    plan_sentence,
    second_sentence,
    weakest_sentence,
    who_is_deep,
    wide_front_records,
)
from .known_goals import (
    ROUTERS,
    goals_side_by_side,
    known_goals,
    known_goals_sentence,
    text_goals,
)
from .live import LiveCurve
from .long import (
    WHO_PAIRS,
    depth_sentence,
    gate_sentence,
    kinds_sentence,
    long_pairs,
    long_records,
    show_long,
    worth_of_depth,
)
from .plan_found import (
    PLAN_FOUND,
    draw_plan_found,
    learning_table,
    plan_found_sentence,
    watch_plan,
)
from .recursion import (
    RECURSION,
    draw_recursion,
    measure_recursion,
    recursion_sentence,
    recursion_table,
)
from .side_by_side import CAPTION, known_depth_headline, known_settings, settings_table
from .stats import (
    compare,
    interval,
    new_seed_range,
    paired,
    rank_correlation,
    variance_explained,
    within,
)
from .tables import (
    Text,
    bits_by_vocabulary,
    by_validation,
    collapse_table,
    comparisons,
    differences,
    front_lines,
    front_table,
    markdown,
    models_table,
    plain_names,
    save_table,
    signed,
    stored_table,
    summary,
    verdicts,
    with_interval,
)
from .verdict import in_short, short_answer, short_depth, short_known
from .worth_measured import WORTH_MEASURED, measure_worth, worth_means, worth_table
