// Tree decode for some rows and one key head. The keys and values of the nodes on a path lie in one range, as in
// tree_attention.cpp, and what the next rows read alike stays there; a row's own keys are read where they are. Every row is
// computed by the same operations in the same order whichever rows stand beside it and wherever its path is cut into nodes
// and keys of its own, so its bits are its own. Compiled once for each instruction set (`CPO_SET`).

#include <type_traits>

#include "attention.h"
#include "vectors.h"

namespace cpo::CPO_SET {

namespace {

#ifdef __AVX512F__
constexpr int tile_queries = 4;
#else
constexpr int tile_queries = 1;
#endif

CPO_INLINE float from_bfloat16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

CPO_INLINE float from_float16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16, magnitude = bits & 0x7fffU;
    uint32_t wide;
    if (magnitude >= 0x7c00U) {  // infinite or NaN
        wide = 0x7f800000U | (magnitude << 13);
    } else {
        wide = magnitude << 13;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        value *= 0x1p112F;  // the exponent's other bias, subnormal numbers included
        std::memcpy(&wide, &value, sizeof wide);
    }
    wide |= sign;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// One head's rows of an arena as T, padded to whole vectors.
template <typename T>
struct Arena {
    const void* data;
    int64_t row, offset, head_dim, dim;
    Stored stored;

    bool direct() const { return stored == (sizeof(T) == 8 ? Stored::float64 : Stored::float32); }

    void copy(int64_t index, T* to) const {
        const int64_t from = index * row + offset;
        if (direct()) {
            copy_padded(to, static_cast<const T*>(data) + from, head_dim, dim, T{1});
            return;
        }
        for (int64_t d = 0; d < dim; ++d) {
            to[d] = d < head_dim ? element(from + d) : 0;
        }
    }

    T element(int64_t index) const {
        switch (stored) {
            case Stored::float64: return static_cast<T>(static_cast<const double*>(data)[index]);
            case Stored::float32: return static_cast<T>(static_cast<const float*>(data)[index]);
            case Stored::bfloat16: return from_bfloat16(static_cast<const uint16_t*>(data)[index]);
            default: return from_float16(static_cast<const uint16_t*>(data)[index]);
        }
    }

    // visit(rows, stride, at, count) for rows [first + at, first + at + count): where they are, or copied in chunks.
    template <typename Visit>
    void each_chunk(int64_t first, int64_t count, T* scratch, Visit visit) const {
        if (direct() && head_dim == dim) {
            for (int64_t at = 0; at < count; at += decode_chunk) {
                const int64_t some = count - at < decode_chunk ? count - at : decode_chunk;
                visit(static_cast<const T*>(data) + (first + at) * row + offset, row, at, some);
            }
            return;
        }
        for (int64_t at = 0; at < count; at += decode_chunk) {
            const int64_t some = count - at < decode_chunk ? count - at : decode_chunk;
            for (int64_t j = 0; j < some; ++j) {
                copy(first + at + j, scratch + j * dim);
            }
            visit(scratch, dim, at, some);
        }
    }
};

// out[m] += sum over j of weights[m][j] * values[j], in order
template <int Rows, typename T>
CPO_INLINE void weigh_some(const T* weights, int64_t longest, const T* values, int64_t stride, int64_t count, T* out,
                           int64_t dim) {
    constexpr int64_t width = Vector<T>::width;
    for (int64_t d = 0; d < dim; d += width) {
        Values<T> sums[Rows];
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
            sums[m] = load(out + m * dim + d);
        }
        for (int64_t j = 0; j < count; ++j) {
            const Values<T> value = load(values + j * stride + d);
#pragma GCC unroll 4
            for (int m = 0; m < Rows; ++m) {
                sums[m] += broadcast(weights[m * longest + j]) * value;
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
            store(out + m * dim + d, sums[m]);
        }
    }
}

// visit(m, std::integral_constant of how many) for tiles of queries, and for those that fill none one by one
template <typename Visit>
CPO_INLINE void each_tile(int64_t num_queries, Visit visit) {
    int64_t m = 0;
    for (; m + tile_queries <= num_queries; m += tile_queries) {
        visit(m, std::integral_constant<int, tile_queries>{});
    }
    for (; m < num_queries; ++m) {
        visit(m, std::integral_constant<int, 1>{});
    }
}

// The keys and values of nodes on the path of the present rows. What the next rows read alike stays.
template <typename T>
struct NodePath {
    Path<T> keys;
    T* values;
    int64_t row_there = -1;  // whose intervals are there

    // Returns how many positions the longest row of a block reads. Its rows differ at most in how far they see the last.
    int64_t load_of(const DecodeRows& rows, int64_t row, const Arena<T>& from_keys, const Arena<T>& from_values) {
        const int64_t first = rows.offsets[row], wanted = rows.offsets[row + 1] - first;
        const int64_t there = row_there < 0 ? 0 : rows.offsets[row_there];
        const int64_t num_there = row_there < 0 ? 0 : rows.offsets[row_there + 1] - there;
        int64_t position = 0, place = 0;
        while (place < wanted && place < num_there && rows.node[there + place] == rows.node[first + place] &&
               rows.count[there + place] == rows.count[first + place]) {
            position += rows.count[first + place++];
        }
        const int64_t unchanged = position;
        row_there = row;
        for (; place < wanted; ++place) {
            for (int64_t key = 0; key < rows.count[first + place]; ++key, ++position) {
                from_keys.copy(rows.start[first + place] + key, keys.row(position));
                from_values.copy(rows.start[first + place] + key, values + position * keys.dim);
            }
        }
        if (position > unchanged) {
            keys.make_panels(unchanged, position);
        }
        return position;
    }
};

int64_t num_node_keys(const DecodeRows& rows, int64_t row) {
    int64_t total = 0;
    for (int64_t i = rows.offsets[row]; i < rows.offsets[row + 1]; ++i) {
        total += rows.count[i];
    }
    return total;
}

// Whether two rows read the same nodes and both have keys of their own, or neither: then the last perhaps not as far.
bool same_nodes(const DecodeRows& rows, int64_t a, int64_t b) {
    const int64_t first = rows.offsets[a], other = rows.offsets[b], count = rows.offsets[a + 1] - first;
    if (rows.offsets[b + 1] - other != count || (rows.own_count[a] == 0) != (rows.own_count[b] == 0)) {
        return false;
    }
    for (int64_t i = 0; i < count; ++i) {
        if (rows.node[first + i] != rows.node[other + i] ||
            ((i + 1 < count || rows.own_count[a] > 0) && rows.count[first + i] != rows.count[other + i])) {
            return false;
        }
    }
    return true;
}

// A row's own keys that its window reaches: arena rows [start, start + count), from its own key number `place` on.
struct OwnKeys {
    int64_t start, count, place;
};

template <typename T>
OwnKeys seen_of_own(const TreeDecode<T>& of, int64_t row) {
    const int64_t own = of.rows.own_count[row], place = of.window > 0 && own > of.window ? own - of.window : 0;
    return {of.rows.own_start[row] + place, own - place, place};
}

// One query: its scores at the `seen` keys of its path, of which it sees those from `oldest` on, to weights; all else in
// [start, stop) to 0. Returns what their sum is.
template <typename T>
struct Softmax {
    const TreeDecode<T>& of;
    int64_t start, oldest, seen, stop, head;

    T operator()(T* scores) const {
        constexpr int64_t width = Vector<T>::width;
        bend(scores + oldest, seen - oldest);
        hide(scores, start, oldest);
        hide(scores, seen, stop);
        Values<T> largest = load(scores + start);
        for (int64_t j = start + width; j < stop; j += width) {
            const Values<T> next = load(scores + j);
            largest = larger(next, largest);
        }
        T maximum = largest_of<T>(largest), sink = 0;
        if (of.sinks != nullptr) {
            sink = of.sinks[head];
            maximum = sink > maximum ? sink : maximum;
        }
        Values<T> total = {};
        for (int64_t j = start; j < stop; j += width) {
            const Values<T> weight = exponential(load(scores + j) - maximum);
            total += weight;
            store(scores + j, weight);
        }
        const T sum = sum_of<T>(total);
        return of.sinks == nullptr ? sum : sum + std::exp(sink - maximum);
    }

    void bend(T* scores, int64_t count) const {
        const T cap = static_cast<T>(of.softcap);
        for (int64_t j = 0; of.softcap > 0 && j < count; ++j) {
            scores[j] = std::tanh(scores[j] / cap) * cap;
        }
    }

    static void hide(T* scores, int64_t from, int64_t to) {
        for (int64_t j = from; j < to; ++j) {
            scores[j] = -std::numeric_limits<T>::infinity();
        }
    }
};

}  // namespace

template <typename T>
void decode_rows(const TreeDecode<T>& of, int64_t first_row, int64_t last_row, int64_t kv_head, T* scratch) {
    constexpr int64_t width = Vector<T>::width;
    const int64_t group = of.num_heads / of.num_kv_heads, dim = rounded_up(of.head_dim, width);
    const int64_t longest = decode_longest(of, width), block = decode_block(of);
    const auto take = [&](int64_t count) { return (scratch += count) - count; };
    T* const key_rows = take(longest * dim);
    const Path<T> keys{key_rows, take(longest * dim), dim};
    T* const values = take(longest * dim);
    T *queries = take(block * dim), *out = take(block * dim), *scores = take(block * longest), *totals = take(block);
    T *const own_rows = take(decode_chunk * dim), *const own_panels = take(decode_chunk * dim);
    NodePath<T> path{keys, values};
    const Arena<T> arena_keys{of.keys, of.key_row, kv_head * of.key_head, of.head_dim, dim, of.stored};
    const Arena<T> arena_values{of.values, of.value_row, kv_head * of.value_head, of.head_dim, dim, of.stored};
    for (int64_t first = first_row, last; first < last_row; first = last) {
        int64_t furthest = first;
        for (last = first + 1; last < last_row && (last - first + 1) * group <= block && same_nodes(of.rows, first, last); ++last) {
            furthest = num_node_keys(of.rows, last) > num_node_keys(of.rows, furthest) ? last : furthest;
        }
        const int64_t num_queries = (last - first) * group, num_nodes = path.load_of(of.rows, furthest, arena_keys, arena_values);
        const int64_t all_nodes = rounded_up(num_nodes, width);
        int64_t start = all_nodes;  // of what any row sees
        for (int64_t m = 0; m < num_queries; ++m) {
            const int64_t row = first + m / group, seen = num_node_keys(of.rows, row) + of.rows.own_count[row];
            const int64_t oldest = of.window > 0 && seen > of.window ? seen - of.window : 0;
            start = oldest < start ? oldest / width * width : start;
            copy_padded(queries + m * dim, of.q.at(row, kv_head * group + m % group), of.head_dim, dim, static_cast<T>(of.scale));
        }
        multiply(Product<T>{queries, dim, 1, keys.panels + start * dim, width, width * dim, scores + start, longest, num_queries,
                            (all_nodes - start) / width, of.head_dim, false});
        for (int64_t m = 0; m < num_queries; m += group) {
            const OwnKeys own = seen_of_own(of, first + m / group);
            arena_keys.each_chunk(own.start, own.count, own_rows, [&](const T* some, int64_t stride, int64_t at, int64_t count) {
                panels_of(some, stride, count, dim, own_panels);
                // over what the nodes' last vector holds past them
                T* to = scores + m * longest + num_nodes + own.place + at;
                multiply(Product<T>{queries + m * dim, dim, 1, own_panels, width, width * dim, to, longest, group,
                                    rounded_up(count, width) / width, of.head_dim, false});
            });
        }
        for (int64_t m = 0; m < num_queries; ++m) {
            const int64_t row = first + m / group, seen = num_node_keys(of.rows, row) + of.rows.own_count[row];
            const int64_t oldest = of.window > 0 && seen > of.window ? seen - of.window : 0;
            const int64_t stop = rounded_up(seen < num_nodes ? num_nodes : seen, width);
            const Softmax<T> softmax{of, start, oldest, seen, stop, kv_head * group + m % group};
            totals[m] = seen == 0 ? T{0} : softmax(scores + m * longest);
        }
        multiply(Product<T>{scores + start, longest, 1, values + start * dim, dim, width, out, dim, num_queries, dim / width,
                            num_nodes - start > 0 ? num_nodes - start : 0, false});
        for (int64_t m = 0; m < num_queries; m += group) {
            const OwnKeys own = seen_of_own(of, first + m / group);
            arena_values.each_chunk(own.start, own.count, own_rows, [&](const T* some, int64_t stride, int64_t at, int64_t count) {
                const T* weights = scores + m * longest + num_nodes + own.place + at;
                each_tile(group, [&](int64_t g, auto rows) {
                    weigh_some<rows>(weights + g * longest, longest, some, stride, count, out + (m + g) * dim, dim);
                });
            });
        }
        for (int64_t m = 0; m < num_queries; ++m) {
            T* result = of.out.at(first + m / group, kv_head * group + m % group);
            for (int64_t d = 0; d < of.head_dim; ++d) {
                result[d] = totals[m] == 0 ? T{0} : out[m * dim + d] / totals[m];
            }
        }
    }
}

template void decode_rows<float>(const TreeDecode<float>&, int64_t, int64_t, int64_t, float*);
template void decode_rows<double>(const TreeDecode<double>&, int64_t, int64_t, int64_t, double*);

}  // namespace cpo::CPO_SET
