// Tree attention for one tree and one key head. The forest is walked depth first with the keys and values of the present
// path on a stack, a token's place being its depth: what a row sees is then one contiguous range, whatever the tree, and
// every visible pair is computed once. Compiled once for each instruction set (`CPO_SET`).

#include <vector>

#include "attention.h"
#include "vectors.h"

namespace cpo::CPO_SET {

namespace {

constexpr int64_t block_rows = 64;  // query rows of a product: their scores stay near the core

// Query rows of one run, all heads of the group: row m is token m / group, head m % group of the key head.
struct Block {
    int64_t first_row, num_rows, group, first_head;
    int64_t first_depth;  // of its first token
    int64_t start, stop;  // depths that it reads, start a multiple of a vector's width

    int64_t row(int64_t m) const { return first_row + m / group; }
    int64_t head(int64_t m) const { return first_head + m % group; }
    int64_t depth(int64_t m) const { return first_depth + m / group; }

    // First depth that a row sees.
    int64_t oldest(int64_t m, int64_t window) const {
        return window > 0 && depth(m) >= window ? depth(m) - window + 1 : 0;
    }
};

struct Sizes {
    int64_t padded_dim, longest, block;
};

template <typename T>
Sizes sizes_of(const TreeAttention<T>& of) {
    constexpr int64_t width = Vector<T>::width;
    const int64_t group = of.num_heads / of.num_kv_heads;
    int64_t longest = rounded_up(of.longest_path, width) + width;
    if (longest % (64 * width) == 0) {
        longest += width;  // rows a power of two apart would share a few sets of the cache
    }
    return {rounded_up(of.head_dim, width), longest, (group < block_rows ? block_rows / group : 1) * group};
}

// Scores of a block, -inf where a row does not see a key, [m, depth - block.start] in rows of `longest`.
template <typename T>
void scores_of(const TreeAttention<T>& of, const Block& block, const Sizes& sizes, const T* queries,
               const Path<T>& keys, T* scores) {
    constexpr int64_t width = Vector<T>::width;
    const int64_t num_vectors = (block.stop - block.start + width - 1) / width;
    multiply(Product<T>{queries, keys.dim, 1, keys.panels + block.start * keys.dim, width, width * keys.dim, scores,
                        sizes.longest, block.num_rows, num_vectors, of.head_dim, false});
    for (int64_t m = 0; m < block.num_rows; ++m) {
        T* row = scores + m * sizes.longest - block.start;  // by depth
        const int64_t first = block.oldest(m, of.window), last = block.depth(m);
        if (of.softcap > 0) {
            const T cap = static_cast<T>(of.softcap);
            for (int64_t j = first; j <= last; ++j) {
                row[j] = std::tanh(row[j] / cap) * cap;
            }
        }
        for (int64_t j = block.start; j < first; ++j) {
            row[j] = -std::numeric_limits<T>::infinity();
        }
        for (int64_t j = last + 1; j < block.start + num_vectors * width; ++j) {
            row[j] = -std::numeric_limits<T>::infinity();
        }
    }
}

template <typename T>
void forward_block(const TreeAttention<T>& of, const Block& block, const Sizes& sizes, const Path<T>& keys,
                   const T* values, T* queries, T* scores, T* sums, T* totals) {
    constexpr int64_t width = Vector<T>::width;
    const int64_t num_vectors = (block.stop - block.start + width - 1) / width;
    for (int64_t m = 0; m < block.num_rows; ++m) {
        copy_padded(queries + m * keys.dim, of.q.at(block.row(m), block.head(m)), of.head_dim, keys.dim,
                    static_cast<T>(of.scale));
    }
    scores_of(of, block, sizes, queries, keys, scores);
    for (int64_t m = 0; m < block.num_rows; ++m) {
        T* row = scores + m * sizes.longest;
        Values<T> largest = load(row);
        for (int64_t n = 1; n < num_vectors; ++n) {
            const Values<T> next = load(row + n * width);
            largest = larger(next, largest);
        }
        T maximum = largest_of<T>(largest);
        Values<T> total = {};
        T sink = 0;
        if (of.sinks != nullptr) {
            sink = of.sinks[block.head(m)];
            maximum = sink > maximum ? sink : maximum;
        }
        for (int64_t n = 0; n < num_vectors; ++n) {
            const Values<T> weight = exponential(load(row + n * width) - maximum);
            total += weight;
            store(row + n * width, weight);
        }
        totals[m] = sum_of<T>(total);
        if (of.sinks != nullptr) {
            totals[m] += std::exp(sink - maximum);
        }
        of.log_sum_exp[block.head(m) * of.num_rows + block.row(m)] = maximum + std::log(totals[m]);
    }
    multiply(Product<T>{scores, sizes.longest, 1, values + block.start * sizes.padded_dim, sizes.padded_dim, width, sums,
                        sizes.padded_dim, block.num_rows, sizes.padded_dim / width, block.stop - block.start, false});
    for (int64_t m = 0; m < block.num_rows; ++m) {
        T* out = of.out.at(block.row(m), block.head(m));
        for (int64_t d = 0; d < of.head_dim; ++d) {
            out[d] = sums[m * sizes.padded_dim + d] / totals[m];
        }
    }
}

template <typename T>
struct BackwardScratch {
    Path<T> keys, values;
    T *grad_keys, *grad_values;
    T *queries, *upstream, *weights, *grad_scores, *grad_queries;
};

template <typename T>
void backward_block(const TreeAttention<T>& of, const Block& block, const Sizes& sizes, const BackwardScratch<T>& at) {
    constexpr int64_t width = Vector<T>::width;
    const int64_t num_keys = block.stop - block.start, dim = sizes.padded_dim;
    const int64_t num_vectors = (num_keys + width - 1) / width;
    for (int64_t m = 0; m < block.num_rows; ++m) {
        const int64_t row = block.row(m), head = block.head(m);
        copy_padded(at.queries + m * dim, of.q.at(row, head), of.head_dim, dim, static_cast<T>(of.scale));
        copy_padded(at.upstream + m * dim, of.grad_out.at(row, head), of.head_dim, dim, T{1});
    }
    scores_of(of, block, sizes, at.queries, at.keys, at.weights);
    multiply(Product<T>{at.upstream, dim, 1, at.values.panels + block.start * dim, width, width * dim, at.grad_scores,
                        sizes.longest, block.num_rows, num_vectors, of.head_dim, false});
    for (int64_t m = 0; m < block.num_rows; ++m) {
        T *weights = at.weights + m * sizes.longest, *grad = at.grad_scores + m * sizes.longest;
        const int64_t place = block.head(m) * of.num_rows + block.row(m);
        const T log_sum_exp = of.log_sum_exp[place], delta = of.delta[place];
        for (int64_t n = 0; n < num_vectors * width; n += width) {
            const Values<T> score = load(weights + n);
            const Values<T> weight = exponential(score - log_sum_exp);
            Values<T> result = weight * (load(grad + n) - delta);
            if (of.softcap > 0) {
                const Values<T> bent = score / static_cast<T>(of.softcap);
                result = result * (broadcast(T{1}) - bent * bent);
            }
            store(weights + n, weight);
            store(grad + n, weighed(weight, result));  // a hidden key's score is -inf
        }
        if (of.sinks == nullptr && block.oldest(m, of.window) == block.depth(m)) {
            grad[block.depth(m) - block.start] = 0;  // the softmax of one score is one, and dp - delta a rounding error
        }
    }
    if (of.grad_v.data != nullptr) {
        multiply(Product<T>{at.weights, 1, sizes.longest, at.upstream, dim, width, at.grad_values + block.start * dim, dim,
                            num_keys, dim / width, block.num_rows, true});
    }
    if (of.grad_k.data != nullptr) {
        multiply(Product<T>{at.grad_scores, 1, sizes.longest, at.queries, dim, width, at.grad_keys + block.start * dim,
                            dim, num_keys, dim / width, block.num_rows, true});
    }
    if (of.grad_q.data != nullptr) {
        multiply(Product<T>{at.grad_scores, sizes.longest, 1, at.keys.rows + block.start * dim, dim, width,
                            at.grad_queries, dim, block.num_rows, dim / width, num_keys, false});
        for (int64_t m = 0; m < block.num_rows; ++m) {
            T* grad = of.grad_q.at(block.row(m), block.head(m));
            for (int64_t d = 0; d < of.head_dim; ++d) {
                grad[d] = at.grad_queries[m * dim + d] * static_cast<T>(of.scale);
            }
        }
    }
}

struct Open {
    int64_t run, depth;  // of its first token
};

// Calls enter(run, depth) for each run in preorder, and leave(run, depth) when its subtree is done, children first.
template <typename Enter, typename Leave>
void walk(const Runs& runs, int64_t first_run, int64_t last_run, Enter enter, Leave leave) {
    std::vector<Open> open;
    const auto close = [&] {
        leave(open.back().run, open.back().depth);
        open.pop_back();
    };
    for (int64_t run = first_run; run < last_run; ++run) {
        while (!open.empty() && runs.end[open.back().run] <= runs.start[run]) {
            close();
        }
        int64_t depth = 0;
        if (!open.empty()) {
            const Open& above = open.back();
            depth = above.depth + runs.stop[above.run] - runs.start[above.run];
        }
        enter(run, depth);
        open.push_back({run, depth});
    }
    while (!open.empty()) {
        close();
    }
}

// Calls visit(block) for the blocks of query rows of a run.
template <typename T, typename Visit>
void each_block(const TreeAttention<T>& of, const Sizes& sizes, int64_t run, int64_t depth, int64_t kv_head, Visit visit) {
    const int64_t group = of.num_heads / of.num_kv_heads, step = sizes.block / group;
    for (int64_t row = of.runs.start[run]; row < of.runs.stop[run]; row += step) {
        const int64_t left = of.runs.stop[run] - row;
        Block block{row, (left < step ? left : step) * group, group, kv_head * group, depth + row - of.runs.start[run], 0, 0};
        block.stop = block.first_depth + block.num_rows / group;
        if (of.window > 0 && block.first_depth >= of.window) {
            block.start = (block.first_depth - of.window + 1) / Vector<T>::width * Vector<T>::width;
        }
        visit(block);
    }
}

}  // namespace

template <typename T>
void forward_tree(const TreeAttention<T>& of, int64_t first_run, int64_t last_run, int64_t kv_head, T* scratch) {
    const Sizes sizes = sizes_of(of);
    const auto take = [&](int64_t count) { return (scratch += count) - count; };
    const int64_t dim = sizes.padded_dim, size = sizes.longest * dim;
    T* const rows = take(size);
    const Path<T> keys{rows, take(size), dim};
    T* const values = take(size);
    T *queries = take(sizes.block * sizes.padded_dim), *sums = take(sizes.block * sizes.padded_dim);
    T *scores = take(sizes.block * sizes.longest), *totals = take(sizes.block);
    walk(
        of.runs, first_run, last_run,
        [&](int64_t run, int64_t depth) {
            const int64_t start = of.runs.start[run], num_tokens = of.runs.stop[run] - start;
            for (int64_t i = 0; i < num_tokens; ++i) {
                copy_padded(keys.row(depth + i), of.k.at(start + i, kv_head), of.head_dim, dim, T{1});
                copy_padded(values + (depth + i) * dim, of.v.at(start + i, kv_head), of.head_dim, dim, T{1});
            }
            keys.make_panels(depth, depth + num_tokens);
            each_block(of, sizes, run, depth, kv_head, [&](const Block& block) {
                forward_block(of, block, sizes, keys, values, queries, scores, sums, totals);
            });
        },
        [](int64_t, int64_t) {});
}

template <typename T>
void backward_tree(const TreeAttention<T>& of, int64_t first_run, int64_t last_run, int64_t kv_head, T* scratch) {
    const Sizes sizes = sizes_of(of);
    const auto take = [&](int64_t count) { return (scratch += count) - count; };
    const int64_t dim = sizes.padded_dim;
    T* stacks[6];
    for (T*& stack : stacks) {
        stack = take(sizes.longest * dim);
    }
    BackwardScratch<T> at{{stacks[0], stacks[1], dim}, {stacks[2], stacks[3], dim}, stacks[4], stacks[5],
                          nullptr, nullptr, nullptr, nullptr, nullptr};
    for (T** buffer : {&at.queries, &at.upstream, &at.grad_queries}) {
        *buffer = take(sizes.block * sizes.padded_dim);
    }
    at.weights = take(sizes.block * sizes.longest);
    at.grad_scores = take(sizes.block * sizes.longest);
    walk(
        of.runs, first_run, last_run,
        [&](int64_t run, int64_t depth) {
            const int64_t start = of.runs.start[run], num_tokens = of.runs.stop[run] - start;
            for (int64_t i = 0; i < num_tokens; ++i) {
                copy_padded(at.keys.row(depth + i), of.k.at(start + i, kv_head), of.head_dim, dim, T{1});
                copy_padded(at.values.row(depth + i), of.v.at(start + i, kv_head), of.head_dim, dim, T{1});
            }
            at.keys.make_panels(depth, depth + num_tokens);
            at.values.make_panels(depth, depth + num_tokens);
            const size_t size = static_cast<size_t>(num_tokens * dim) * sizeof(T);
            std::memset(at.grad_keys + depth * dim, 0, size);
            std::memset(at.grad_values + depth * dim, 0, size);
            each_block(of, sizes, run, depth, kv_head, [&](const Block& block) { backward_block(of, block, sizes, at); });
        },
        [&](int64_t run, int64_t depth) {  // all that sees its keys has added its part
            const int64_t start = of.runs.start[run], num_tokens = of.runs.stop[run] - start;
            const size_t size = static_cast<size_t>(of.head_dim) * sizeof(T);
            for (int64_t i = 0; i < num_tokens; ++i) {
                if (of.grad_k.data != nullptr) {
                    std::memcpy(of.grad_k.at(start + i, kv_head), at.grad_keys + (depth + i) * dim, size);
                }
                if (of.grad_v.data != nullptr) {
                    std::memcpy(of.grad_v.at(start + i, kv_head), at.grad_values + (depth + i) * dim, size);
                }
            }
        });
}

template void forward_tree<float>(const TreeAttention<float>&, int64_t, int64_t, int64_t, float*);
template void forward_tree<double>(const TreeAttention<double>&, int64_t, int64_t, int64_t, double*);
template void backward_tree<float>(const TreeAttention<float>&, int64_t, int64_t, int64_t, float*);
template void backward_tree<double>(const TreeAttention<double>&, int64_t, int64_t, int64_t, double*);

}  // namespace cpo::CPO_SET
