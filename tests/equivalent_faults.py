"""The faults of ``mutate.py`` that no test can see, and why: with them the kernels still do what they should."""

_SAME = {
    "of two equal numbers either will do": """
        accumulators.cuh: > off by one: squares > FLT_MAX
        accumulators.cuh: < off by one: m2 < 0
        batch_norm_gather_stats.cuh: > off by one: all.count > 1
    """,
    "it only saves work: what it lets through has no values, and comes to nothing": """
        batch_norm_backward.cuh: if never: at.span.empty()
        batch_norm_backward.cuh: && without: row < end
        batch_norm_backward.cuh: < off by one: row < end (again, 1)
        batch_norm_backward.cuh: && without: unit < units (again, 2)
        batch_norm_backward.cuh: < off by one: unit < units (again, 2)
        batch_norm_backward.cuh: < off by one: number_of(step) < block.end
        batch_norm_resident.cuh: && without: tile < s.tiles
        batch_norm_resident.cuh: < off by one: tile < s.tiles
        batch_norm_stats.cuh: if always: !at.span.empty()
        batch_norm_stats.cuh: if never: count == 0 (again, 1)
        batch_norm_stats.cuh: if always: !span.whole()
        batch_norm_stats.cuh: if always: !spans[i].whole()
        batch_norm_stats.cuh: && without: row < end
        batch_norm_stats.cuh: < off by one: row < end (again, 1)
        batch_norm_stats.cuh: < off by one: number_of(step) < block.end
        batch_norm_stats.cuh: > off by one: rest.end > 0
        batch_norm_stats.cuh: && without: rest.end > 0
        layout.cuh: if never: s.inner % kUnit == 0
        layout.cuh: if always: first + i * lanes < partials (again, 1)
        layout.cuh: ? never: channels < blockDim.x
        layout.cuh: ? never: partials < most
        layout.cuh: < off by one: base < channels
        layout.cuh: < off by one: first < partials
        layout.cuh: missing: __nanosleep(64);
        on_chip.cuh: if always: fetched
        on_chip.cuh: if always: fetched_
        pack.cuh: >= off by one: begin >= end
    """,
    "what is kept of no unit is not recalled": """
        batch_norm_backward.cuh: if always: r < end && unit < units (again, 1)
        batch_norm_backward.cuh: && without: r < end (again, 1)
        batch_norm_backward.cuh: < off by one: r < end (again, 1)
        batch_norm_backward.cuh: && without: unit < units (again, 1)
        batch_norm_backward.cuh: < off by one: unit < units (again, 1)
        batch_norm_stats.cuh: if always: row + i * s.lanes < end
        batch_norm_stats.cuh: < off by one: row + i * s.lanes < end
    """,
    "it writes what is there": """
        batch_norm_backward.cuh: if always: !fetched
        batch_norm_backward.cuh: if never: fetched
        batch_norm_resident.cuh: && without: !kept.has_fetched(step, span)
        batch_norm_stats.cuh: missing: total[k].count = total[0].count;
    """,
    "a quotient of equal numbers is 1 here, and on a GPU nearly": """
        accumulators.cuh: ? never: count == 0
    """,
    "float64 does not need it, and is as accurate with it": """
        accumulators.cuh: < off by one: sizeof(A) < sizeof(double)
        accumulators.cuh: && without: sizeof(A) < sizeof(double)
    """,
    "a run of a step more": """
        batch_norm_backward.cuh: < off by one: step < kStepsOfRun
        batch_norm_stats.cuh: < off by one: step < kStepsOfRun
    """,
    "the shift is then another of the values, or is moved by next to nothing, and what rests on it is mended": """
        batch_norm_stats.cuh: if always: step == kStepsToCenter
        batch_norm_stats.cuh: if always: count == 0
        batch_norm_stats.cuh: if always: pass == 1
        batch_norm_stats.cuh: < off by one: k < span.begin
        batch_norm_stats.cuh: ? always: k < span.begin
    """,
    "squares of the first pass are dropped": """
        batch_norm_stats.cuh: if always: pass > 0
        batch_norm_stats.cuh: > off by one: pass > 0
    """,
}
# The reason of each fault.
EQUIVALENT = {fault.strip(): why for why, faults in _SAME.items() for fault in faults.strip().splitlines()}
