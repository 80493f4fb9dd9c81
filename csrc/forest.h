// Token sequences -> the forest: the token trie of all sequences, laid out in depth-first preorder as one packed sequence.
//
// Roots and children stand in order of first appearance and equal prefixes share rows, so that
// token i may see token j  <=>  j <= i < subtree_end[j].
// And preference pairs -> micro-batches whose forests stay within a number of tokens.

#pragma once

#include <cstdint>
#include <vector>

namespace cpo {

// T rows after padding, S sequences, N tokens in all sequences together.
struct Forest {
    std::vector<int32_t> tokens;         // [T] token id; 0 on padding
    std::vector<int32_t> position_ids;   // [T] depth in tokens; 0 on padding
    std::vector<int32_t> subtree_end;    // [T] one past the last row of the row's subtree; i + 1 on padding
    std::vector<int32_t> parent_row;     // [T] row of the preceding token; -1 at a root and on padding
    std::vector<int32_t> path_rows;      // [N] the rows of sequence s at path_offsets[s] : path_offsets[s + 1]
    std::vector<int64_t> path_offsets;   // [S + 1]
    int64_t num_tokens = 0;              // rows before padding
};

// tokens: [N], sequence s at offsets[s] : offsets[s + 1], ids in [0, 2^31). Linear in N for any shape of trie.
// Throws std::invalid_argument naming the sequence for an empty sequence or an id out of range, and for more than
// 2^31 - 1 rows. No sequences give T = 0, whatever the padding.
Forest build_forest(const int64_t* tokens, const int64_t* offsets, int64_t num_sequences, int64_t pad_to_multiple_of);

// P pairs in B micro-batches.
struct PairSplit {
    std::vector<int64_t> order;          // [P] pairs in the lexicographic order of their prompts, equal ones as they came
    std::vector<int64_t> batch_offsets;  // [B + 1] micro-batch b holds order[batch_offsets[b] : batch_offsets[b + 1]]
    std::vector<int64_t> batch_tokens;   // [B] tokens of its forest; more than max_tokens only for a pair alone
};

// Pair p has the sequences 2 p and 2 p + 1 of tokens [N], each of which begins with the pair's prompt of
// prompt_lengths[p] tokens. Pairs are taken in the order of their prompts, and a micro-batch ends before the pair whose
// new tokens would exceed max_tokens. Throws std::invalid_argument naming the sequence for an id outside [0, 2^31).
PairSplit split_pairs(const int64_t* tokens, const int64_t* offsets, const int64_t* prompt_lengths, int64_t num_pairs,
                      int64_t max_tokens);

}  // namespace cpo
