// subtree_end -> which blocks of the attention matrix a tiled kernel visits, and which of them need no mask.

#pragma once

#include <cstdint>
#include <vector>

namespace cpo {

// Q = ceil(T / block_q) query blocks, K = ceil(T / block_kv) key blocks, N runs of rows without a branch.
struct Schedule {
    std::vector<int32_t> kv_query_start;   // [K] rows [start, stop) see at least one key of the block, no other row does
    std::vector<int32_t> kv_query_stop;    // [K]
    std::vector<int32_t> kv_full_start;    // [K] rows [start, stop) see all block_kv keys, no other row does
    std::vector<int32_t> kv_full_stop;     // [K]
    std::vector<int32_t> full_offsets;     // [Q + 1]
    std::vector<int32_t> full_blocks;      // key blocks of query block q that need no mask, ascending
    std::vector<int32_t> partial_offsets;  // [Q + 1]
    std::vector<int32_t> partial_blocks;   // key blocks of query block q that need the mask, ascending
    std::vector<int32_t> work_block;       // [W] key block of a piece of work on dK and dV, ascending
    std::vector<int32_t> work_start;       // [W] the piece's query rows [start, stop); pieces of a block follow on
    std::vector<int32_t> work_stop;        // [W] from one another and cover its query range
    std::vector<int32_t> work_part;        // [W] -1 where the piece is the block's whole range, else its place among parts
    std::vector<int32_t> split_block;      // [B] key blocks whose query range is cut into parts, ascending
    std::vector<int32_t> split_offsets;    // [B + 1] parts of split_block[b] are split_offsets[b]:split_offsets[b + 1]
    std::vector<int32_t> segment_start;    // [N] first row of the run
    std::vector<int32_t> segment_stop;     // [N] one past its last row
    std::vector<int32_t> segment_end;      // [N] subtree_end of its rows
    std::vector<int32_t> depths;           // [T] rows above each row on its own path; empty without a window
};

// Throws std::invalid_argument naming the row unless i < subtree_end[i] <= T and the intervals [i, subtree_end[i])
// nest: each lies inside any other that contains its start.
void validate_subtree_end(const int32_t* subtree_end, int64_t num_rows);

// Time O(T + visited blocks). Validates subtree_end; throws std::invalid_argument for a block size below 1 too, and for
// heads that are no multiple of the key heads. The heads decide only how the work on dK and dV is cut.
// With a window, 0 for none, blocks are skipped that no row sees through it and full where all rows see all keys. The time
// is then that of the rows that would see each block without it; kv_query_stop is one past the last row that sees the
// block, [kv_full_start, kv_full_stop) the first rows that see all of it, and the work leaves out rows that see nothing.
Schedule tree_schedule(const int32_t* subtree_end, int64_t num_rows, int64_t block_q, int64_t block_kv, int64_t num_heads,
                       int64_t num_kv_heads, int64_t window);

}  // namespace cpo
