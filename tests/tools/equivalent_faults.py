"""The faults of ``mutate.py`` that no test can see, because the kernels are still right with them; and the reasons."""

_SAME = {
    "the two numbers are equal, and either is right": """
        accumulators.cuh: <= off by one: squares <= FLT_MAX
        accumulators.cuh: < off by one: m2 < 0
        batch_norm_gather_stats.cuh: > off by one: all.count > 1
        pointwise.cuh: < off by one: z < low
        sweep.cuh: < off by one: s.units - begin < s.units_per_block
    """,
    "both branches make zero of zero": """
        pointwise.cuh: <= off by one: z[k] <= 0
        pointwise.cuh: > off by one: z > 0
        pointwise.cuh: > off by one: z > 0 (again, 1)
    """,
    "of zero, the exponential is 1 and the sigmoid 1/2, and both branches are 1/2": """
        pointwise.cuh: > off by one: z > 0 (again, 4)
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
        batch_norm_stats.cuh: && without: row < end
        batch_norm_stats.cuh: < off by one: row < end (again, 1)
        batch_norm_stats.cuh: < off by one: number_of(step) < block.end
        batch_norm_stats.cuh: > off by one: rest.end > 0
        batch_norm_stats.cuh: && without: rest.end > 0
        layout.cuh: if always: first + i * row_slots < partials (again, 1)
        layout.cuh: < off by one: first + i * row_slots < partials (again, 1)
        layout.cuh: ? never: partials < most
        layout.cuh: < off by one: base < channels
        layout.cuh: < off by one: first < partials
        pack.cuh: >= off by one: begin >= end
        sweep.cuh: < off by one: done < rows
        sweep.cuh: < off by one: unit < end
        sweep.cuh: > off by one: left > 0
        sweep.cuh: if always: !at.span.empty() (again, 1)
    """,
    "it only saves work: what it leaves to do finds the same": """
        batch_norm_stats.cuh: if always: !span.whole()
        batch_norm_stats.cuh: if always: !spans[i].whole()
        layout.cuh: if never: s.inner % kUnit == 0
        layout.cuh: ? never: channels < blockDim.x
        layout.cuh: missing: __nanosleep(64);
        sweep.cuh: ? never: s.copies == 1
        sweep.cuh: if never: place + kUnit <= s.inner
        sweep.cuh: <= off by one: place + kUnit <= s.inner
    """,
    "a division finds the same, but for planes of more than 2^32 values": """
        sweep.cuh: ? never: at < 2 * s.inner
    """,
    "it ends or awaits a group of no copies; for a GPU that has no copies, nvcc refuses it": """
        on_chip.cuh: if always: fetched
        on_chip.cuh: if always: fetched_
    """,
    "what is kept of no unit is not recalled": """
        batch_norm_backward.cuh: if always: r < end && unit < units (again, 1)
        batch_norm_backward.cuh: && without: r < end (again, 1)
        batch_norm_backward.cuh: < off by one: r < end (again, 1)
        batch_norm_backward.cuh: && without: unit < units (again, 1)
        batch_norm_backward.cuh: < off by one: unit < units (again, 1)
        batch_norm_stats.cuh: if always: row + i * s.row_slots < end
        batch_norm_stats.cuh: < off by one: row + i * s.row_slots < end
    """,
    "it writes what is there": """
        batch_norm_stats.cuh: missing: total[k].count = merged;
        batch_norm_backward.cuh: if always: !fetched
        batch_norm_backward.cuh: if never: fetched
        batch_norm_stats.cuh: if always: !fetched
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
        batch_norm_stats.cuh: if always: row + i * s.row_slots >= beyond
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
# From each fault to its reason.
EQUIVALENT = {fault.strip(): why for why, faults in _SAME.items() for fault in faults.strip().splitlines()}
