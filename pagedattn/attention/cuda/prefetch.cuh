// What programs ask for before they know which of it they need.
#pragma once
#include "hopper.cuh"

// Have lengths and block tables on their way to the L2: of all their lines of 128 bytes, that with this number.
// This may be done before the launch before is over: what that still writes goes to the L2 as well. Returns the
// number among the lines that come after these, negative for one of these.
template <typename Parameters>
DEVICE int prefetch_batch(const Parameters &p, int line) {
    int starts = (p.num_sequences + 32) / 32, tables = p.num_sequences * p.table_lines;
    int table_line = line - starts;
    if (line < starts) {
        prefetch_l2(p.query_starts + line * 32);
        if (line * 32 < p.num_sequences) prefetch_l2(p.kv_lengths + line * 32);
    } else if (table_line < tables) {
        prefetch_l2(p.tables + table_line / p.table_lines * p.table_stride + table_line % p.table_lines * 32);
    }
    return table_line - tables;
}
