"""What a model costs to run: arithmetic, time, memory, energy, its size as int8; and the bench of speed."""

from .figures import (
    break_even_rates,
    growth_curves,
    milliseconds_against_depth,
    parts_of_a_step,
    time_against_depth,
)
from .flops import arithmetic, flops, training_flops
from .goals import misses, table
from .grown import basis, estimate, findings, growth_records, show_growth, table_of
from .live import Measured, against_fixed
from .probes import (
    NOT_MEASURABLE,
    PARTS,
    as_int8,
    energy_a_token,
    energy_counter,
    int8_table,
    memory_and_energy,
    peak_memory,
    stored_bytes,
    where_time_goes,
)
from .speed import (
    about,
    first_table,
    headline,
    machine,
    operations_and_time,
    ratios,
    short,
    speed_records,
    stored_milliseconds,
    training_sentence,
)
from .systems import measure_systems, save_systems, stored_systems
from .timing import (
    Timings,
    break_even,
    break_even_table,
    build,
    decoding,
    forward_pass,
    in_turn,
    serving,
    training_step,
)
