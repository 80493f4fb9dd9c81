// Attention on a CPU: tree attention of training, forward and backward, and tree decode of a search. Every function exists
// once for each instruction set, in a namespace of its own; `attention.cpp` chooses and shares out the work. What is inline
// here is compiled for every set, so it must leave no symbol behind: a linker keeps one of several, of whichever set.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cpo {

// Rows of heads in a tensor [rows, heads, head_dim] whose last dimension is contiguous.
template <typename T>
struct Heads {
    T* data;
    int64_t row, head;  // strides

    __attribute__((always_inline)) T* at(int64_t of_row, int64_t of_head) const {
        return data + of_row * row + of_head * head;
    }
};

// Branchless runs of a forest in preorder, as `Schedule` has them: rows [start, stop) whose subtrees end at `end`.
struct Runs {
    const int32_t *start, *stop, *end;
    int64_t num_runs;
};

template <typename T>
struct TreeAttention {
    Runs runs;
    int64_t num_rows, num_heads, num_kv_heads, head_dim;
    Heads<const T> q, k, v;
    double scale;
    int64_t window;     // 0: none
    double softcap;     // 0: none
    const T* sinks;     // [H] or null
    Heads<T> out;       // forward
    T* log_sum_exp;     // [H, T], written by forward, read by backward
    Heads<const T> grad_out;
    const T* delta;     // [H, T], sum of dout * out
    Heads<T> grad_q, grad_k, grad_v;  // backward, data null where not wanted
    int64_t longest_path;
};

// Both throw std::invalid_argument where runs do not cover the rows one after another.
template <typename T>
void tree_attention_forward(TreeAttention<T> of, int num_threads);
template <typename T>
void tree_attention_backward(TreeAttention<T> of, int num_threads);

// What each row of a decode step reads: intervals of arena rows in path order, [offsets[r], offsets[r + 1]) of them, which
// other rows may read too, and then keys of its own.
struct DecodeRows {
    const int64_t *start, *count, *node, *offsets, *own_start, *own_count;  // equal nodes are read once
    int64_t num_rows, num_intervals;
    int64_t longest_nodes = 0, longest_own = 0;  // most keys of any row, set by `tree_decode`
};

enum class Stored { float64, float32, bfloat16, float16 };

template <typename T>
struct TreeDecode {
    DecodeRows rows;
    int64_t num_heads, num_kv_heads, head_dim;
    Heads<const T> q;
    const void *keys, *values;  // arenas of num_arena_rows, elements as `stored` says
    int64_t num_arena_rows;
    int64_t key_row, key_head, value_row, value_head;  // strides
    Stored stored;
    double scale;
    int64_t window;  // 0: none
    double softcap;  // 0: none
    const T* sinks;  // [H] or null
    Heads<T> out;
};

constexpr int64_t decode_chunk = 64;  // a row's own keys that are converted at once

// Positions of a row of scores: a row's nodes, its own keys behind them, and a vector to spare, as whole ones are written.
template <typename T>
static inline int64_t decode_longest(const TreeDecode<T>& of, int64_t width) {
    const int64_t longest = (of.rows.longest_nodes + width - 1) / width + (of.rows.longest_own + width - 1) / width + 1;
    return (longest % 64 == 0 ? longest + 1 : longest) * width;  // not a power of two apart
}

// Queries of one product.
template <typename T>
static inline int64_t decode_block(const TreeDecode<T>& of) {
    const int64_t group = of.num_heads / of.num_kv_heads;
    return group < 64 ? 64 / group * group : group;
}

// Throws std::invalid_argument where rows read what no arena has.
template <typename T>
void tree_decode(TreeDecode<T> of, int num_threads);

// Instruction sets that the running machine has and the kernels were compiled for, the one that they use at first first.
std::vector<std::string> instruction_sets();
// Of all calls from now on. For tests and measurements.
void use_instruction_set(const std::string& name);

#define CPO_FOR_EACH_SET(namespace_name)                                                                                 \
    namespace namespace_name {                                                                                           \
    template <typename T>                                                                                                \
    void forward_tree(const TreeAttention<T>& of, int64_t first_run, int64_t last_run, int64_t kv_head, T* scratch);    \
    template <typename T>                                                                                                \
    void backward_tree(const TreeAttention<T>& of, int64_t first_run, int64_t last_run, int64_t kv_head, T* scratch);   \
    template <typename T>                                                                                                \
    void decode_rows(const TreeDecode<T>& of, int64_t first_row, int64_t last_row, int64_t kv_head, T* scratch);        \
    }

CPO_FOR_EACH_SET(baseline)
CPO_FOR_EACH_SET(avx2)
CPO_FOR_EACH_SET(avx512)
#undef CPO_FOR_EACH_SET

}  // namespace cpo
