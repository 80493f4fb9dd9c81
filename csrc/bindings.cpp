// cpo_kernels._csrc: numpy arrays in, numpy arrays out. The arrays of one result share one owner and are not copied;
// the interpreter lock is released while a result is computed. std::invalid_argument becomes ValueError.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "forest.h"
#include "schedule.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
using Output = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

// Moves a result to the heap and hands out views of its vectors, which keep it alive.
template <typename Result>
class Shared {
public:
    explicit Shared(Result&& result) : result_(new Result(std::move(result))) {
        owner_ = nb::capsule(result_, [](void* pointer) noexcept { delete static_cast<Result*>(pointer); });
    }

    template <typename T>
    Output<T> view(std::vector<T> Result::*member) const {
        std::vector<T>& values = result_->*member;
        return Output<T>(values.data(), {values.size()}, owner_);
    }

    const Result& operator*() const { return *result_; }

private:
    Result* result_;
    nb::capsule owner_;
};

// Sequence s is tokens[offsets[s] : offsets[s + 1]]; returns how many there are.
int64_t check_offsets(const Input<int64_t>& tokens, const Input<int64_t>& offsets) {
    const auto num_offsets = static_cast<int64_t>(offsets.shape(0));
    const int64_t* at = offsets.data();
    if (num_offsets < 1 || at[0] != 0 || at[num_offsets - 1] != static_cast<int64_t>(tokens.shape(0))) {
        throw std::invalid_argument("expected offsets from 0 to the number of tokens");
    }
    for (int64_t s = 1; s < num_offsets; ++s) {
        if (at[s] < at[s - 1]) {
            throw std::invalid_argument("expected ascending offsets");
        }
    }
    return num_offsets - 1;
}

nb::tuple build_forest(Input<int64_t> tokens, Input<int64_t> offsets, int64_t pad_to_multiple_of) {
    const int64_t num_sequences = check_offsets(tokens, offsets);
    cpo::Forest forest;
    {
        nb::gil_scoped_release unlocked;
        forest = cpo::build_forest(tokens.data(), offsets.data(), num_sequences, pad_to_multiple_of);
    }
    const Shared<cpo::Forest> shared(std::move(forest));
    return nb::make_tuple(shared.view(&cpo::Forest::tokens), shared.view(&cpo::Forest::position_ids),
                          shared.view(&cpo::Forest::subtree_end), shared.view(&cpo::Forest::parent_row),
                          shared.view(&cpo::Forest::path_rows), shared.view(&cpo::Forest::path_offsets),
                          (*shared).num_tokens);
}

nb::tuple split_pairs(Input<int64_t> tokens, Input<int64_t> offsets, Input<int64_t> prompt_lengths, int64_t max_tokens) {
    const int64_t num_sequences = check_offsets(tokens, offsets);
    const auto num_pairs = static_cast<int64_t>(prompt_lengths.shape(0));
    if (num_sequences != 2 * num_pairs) {
        throw std::invalid_argument("expected two sequences a pair");
    }
    for (int64_t s = 0; s < num_sequences; ++s) {
        const int64_t prompt_length = prompt_lengths.data()[s / 2];
        if (prompt_length < 0 || prompt_length > offsets.data()[s + 1] - offsets.data()[s]) {
            throw std::invalid_argument("expected prompts no longer than their sequences");
        }
    }
    cpo::PairSplit split;
    {
        nb::gil_scoped_release unlocked;
        split = cpo::split_pairs(tokens.data(), offsets.data(), prompt_lengths.data(), num_pairs, max_tokens);
    }
    const Shared<cpo::PairSplit> shared(std::move(split));
    return nb::make_tuple(shared.view(&cpo::PairSplit::order), shared.view(&cpo::PairSplit::batch_offsets),
                          shared.view(&cpo::PairSplit::batch_tokens));
}

nb::dict tree_schedule(Input<int32_t> subtree_end, int64_t block_q, int64_t block_kv, int64_t num_heads,
                       int64_t num_kv_heads, int64_t window) {
    cpo::Schedule schedule;
    {
        nb::gil_scoped_release unlocked;
        schedule = cpo::tree_schedule(subtree_end.data(), static_cast<int64_t>(subtree_end.shape(0)), block_q, block_kv,
                                      num_heads, num_kv_heads, window);
    }
    const Shared<cpo::Schedule> shared(std::move(schedule));
    nb::dict arrays;
    arrays["kv_query_start"] = shared.view(&cpo::Schedule::kv_query_start);
    arrays["kv_query_stop"] = shared.view(&cpo::Schedule::kv_query_stop);
    arrays["kv_full_start"] = shared.view(&cpo::Schedule::kv_full_start);
    arrays["kv_full_stop"] = shared.view(&cpo::Schedule::kv_full_stop);
    arrays["full_offsets"] = shared.view(&cpo::Schedule::full_offsets);
    arrays["full_blocks"] = shared.view(&cpo::Schedule::full_blocks);
    arrays["partial_offsets"] = shared.view(&cpo::Schedule::partial_offsets);
    arrays["partial_blocks"] = shared.view(&cpo::Schedule::partial_blocks);
    arrays["work_block"] = shared.view(&cpo::Schedule::work_block);
    arrays["work_start"] = shared.view(&cpo::Schedule::work_start);
    arrays["work_stop"] = shared.view(&cpo::Schedule::work_stop);
    arrays["work_part"] = shared.view(&cpo::Schedule::work_part);
    arrays["split_block"] = shared.view(&cpo::Schedule::split_block);
    arrays["split_offsets"] = shared.view(&cpo::Schedule::split_offsets);
    arrays["segment_start"] = shared.view(&cpo::Schedule::segment_start);
    arrays["segment_stop"] = shared.view(&cpo::Schedule::segment_stop);
    arrays["segment_end"] = shared.view(&cpo::Schedule::segment_end);
    arrays["depths"] = shared.view(&cpo::Schedule::depths);
    return arrays;
}

template <typename T>
using HeadArray = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;

template <typename T>
using Column = std::optional<nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>>;

template <typename T>
using ByHead = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
cpo::Heads<T> heads(const HeadArray<T>& array) {
    if (array.size() > 0 && array.shape(2) > 1 && array.stride(2) != 1) {
        throw std::invalid_argument("expected a contiguous last dimension");
    }
    return {array.data(), array.stride(0), array.stride(1)};
}

template <typename T>
cpo::Heads<T> heads(const std::optional<HeadArray<T>>& array) {
    return array ? heads(*array) : cpo::Heads<T>{nullptr, 0, 0};
}

void expect(bool holds, const char* message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

template <typename Array, typename Other>
bool same_shape(const Array& a, const Other& b) {
    return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1) && a.shape(2) == b.shape(2);
}

template <typename T>
const T* sinks_of(const Column<T>& sinks, int64_t num_heads) {
    expect(!sinks || static_cast<int64_t>(sinks->shape(0)) == num_heads, "expected a sink for each head");
    return sinks ? sinks->data() : nullptr;
}

void check_heads(int64_t num_heads, int64_t num_kv_heads) {
    expect(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0,
           "expected query heads, a multiple of the key heads");
}

template <typename T>
cpo::TreeAttention<T> tree_attention_of(const HeadArray<const T>& q, const HeadArray<const T>& k, const HeadArray<const T>& v,
                                        const Input<int32_t>& start, const Input<int32_t>& stop, const Input<int32_t>& end,
                                        double scale, int64_t window, double softcap) {
    cpo::TreeAttention<T> of{};
    expect(same_shape(k, v) && k.shape(0) == q.shape(0) && k.shape(2) == q.shape(2), "expected k and v [T, Hkv, D] as q");
    expect(start.shape(0) == stop.shape(0) && start.shape(0) == end.shape(0), "expected runs of one length");
    of.runs = {start.data(), stop.data(), end.data(), static_cast<int64_t>(start.shape(0))};
    of.num_rows = static_cast<int64_t>(q.shape(0));
    of.num_heads = static_cast<int64_t>(q.shape(1));
    of.num_kv_heads = static_cast<int64_t>(k.shape(1));
    of.head_dim = static_cast<int64_t>(q.shape(2));
    check_heads(of.num_heads, of.num_kv_heads);
    of.q = heads(q);
    of.k = heads(k);
    of.v = heads(v);
    of.scale = scale;
    of.window = window;
    of.softcap = softcap;
    return of;
}

template <typename T>
void tree_attention_forward(HeadArray<const T> q, HeadArray<const T> k, HeadArray<const T> v, Input<int32_t> start,
                            Input<int32_t> stop, Input<int32_t> end, double scale, int64_t window, double softcap,
                            Column<T> sinks, HeadArray<T> out, ByHead<T> log_sum_exp, int num_threads) {
    cpo::TreeAttention<T> of = tree_attention_of<T>(q, k, v, start, stop, end, scale, window, softcap);
    expect(same_shape(out, q) && log_sum_exp.shape(0) == q.shape(1) && log_sum_exp.shape(1) == q.shape(0),
           "expected out [T, H, D] and log_sum_exp [H, T]");
    of.sinks = sinks_of<T>(sinks, of.num_heads);
    of.out = heads(out);
    of.log_sum_exp = log_sum_exp.data();
    nb::gil_scoped_release unlocked;
    cpo::tree_attention_forward(of, num_threads);
}

template <typename T>
void tree_attention_backward(HeadArray<const T> q, HeadArray<const T> k, HeadArray<const T> v, Input<int32_t> start,
                             Input<int32_t> stop, Input<int32_t> end, double scale, int64_t window, double softcap,
                             Column<T> sinks, ByHead<T> log_sum_exp, ByHead<T> delta, HeadArray<const T> grad_out,
                             std::optional<HeadArray<T>> grad_q, std::optional<HeadArray<T>> grad_k,
                             std::optional<HeadArray<T>> grad_v, int num_threads) {
    cpo::TreeAttention<T> of = tree_attention_of<T>(q, k, v, start, stop, end, scale, window, softcap);
    expect(same_shape(grad_out, q) && log_sum_exp.shape(0) == q.shape(1) && log_sum_exp.shape(1) == q.shape(0) &&
               delta.shape(0) == q.shape(1) && delta.shape(1) == q.shape(0),
           "expected grad_out [T, H, D], log_sum_exp and delta [H, T]");
    expect((!grad_q || same_shape(*grad_q, q)) && (!grad_k || same_shape(*grad_k, k)) && (!grad_v || same_shape(*grad_v, v)),
           "expected gradients of the shapes of q, k and v");
    of.sinks = sinks_of<T>(sinks, of.num_heads);
    of.log_sum_exp = log_sum_exp.data();
    of.delta = delta.data();
    of.grad_out = heads(grad_out);
    of.grad_q = heads(grad_q);
    of.grad_k = heads(grad_k);
    of.grad_v = heads(grad_v);
    nb::gil_scoped_release unlocked;
    cpo::tree_attention_backward(of, num_threads);
}

// An arena's elements by the name of their dtype; 16-bit ones are handed over as int16.
cpo::Stored stored(const std::string& dtype) {
    return dtype == "float64"    ? cpo::Stored::float64
           : dtype == "float32"  ? cpo::Stored::float32
           : dtype == "bfloat16" ? cpo::Stored::bfloat16
                                 : cpo::Stored::float16;
}

using Arena = nb::ndarray<nb::ndim<3>, nb::device::cpu>;
using NewRows = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;

void check_arena(const Arena& arena, const NewRows& rows, const Input<int64_t>& slots, size_t size, size_t head_dim) {
    expect(arena.itemsize() == size && rows.itemsize() == size, "expected arenas and new rows of the dtype that is named");
    expect(rows.shape(0) == slots.shape(0) && rows.shape(1) == arena.shape(1) && rows.shape(2) == arena.shape(2) &&
               arena.shape(2) == head_dim,
           "expected new rows [N, Hkv, D] and arenas [C, Hkv, D]");
    expect(rows.size() == 0 || head_dim <= 1 || (arena.stride(2) == 1 && rows.stride(2) == 1),
           "expected a contiguous last dimension");
    for (size_t row = 0; row < slots.shape(0); ++row) {
        expect(slots.data()[row] >= 0 && static_cast<size_t>(slots.data()[row]) < arena.shape(0),
               "tree_decode: the plan names slots that the arena does not have");
    }
}

void store_rows(const Arena& arena, const NewRows& rows, const Input<int64_t>& slots) {
    const size_t size = arena.itemsize(), bytes = size * arena.shape(2);
    auto* to = static_cast<char*>(arena.data());
    const auto* from = static_cast<const char*>(rows.data());
    for (size_t row = 0; row < slots.shape(0); ++row) {
        for (size_t head = 0; head < arena.shape(1); ++head) {
            const int64_t target = slots.data()[row] * arena.stride(0) + static_cast<int64_t>(head) * arena.stride(1);
            const int64_t source = static_cast<int64_t>(row) * rows.stride(0) + static_cast<int64_t>(head) * rows.stride(1);
            std::memcpy(to + target * static_cast<int64_t>(size), from + source * static_cast<int64_t>(size), bytes);
        }
    }
}

template <typename T>
void tree_decode(HeadArray<const T> q, NewRows k_new, NewRows v_new, Arena k_arena, Arena v_arena, std::string dtype,
                 Input<int64_t> slots, Input<int64_t> start, Input<int64_t> count, Input<int64_t> node, Input<int64_t> offsets,
                 Input<int64_t> own_start, Input<int64_t> own_count, double scale, int64_t window, double softcap,
                 Column<T> sinks, HeadArray<T> out, int num_threads) {
    cpo::TreeDecode<T> of{};
    const size_t num_rows = q.shape(0);
    expect(slots.shape(0) == num_rows && offsets.shape(0) == num_rows + 1 && own_start.shape(0) == num_rows &&
               own_count.shape(0) == num_rows && start.shape(0) == count.shape(0) &&
               start.shape(0) == node.shape(0) && same_shape(out, q),
           "expected a plan and out of the rows of q");
    expect(k_arena.shape(0) == v_arena.shape(0) && k_arena.shape(1) == v_arena.shape(1), "expected arenas of one shape");
    of.rows = {start.data(), count.data(), node.data(), offsets.data(), own_start.data(), own_count.data(),
               static_cast<int64_t>(num_rows), static_cast<int64_t>(start.shape(0))};
    of.num_heads = static_cast<int64_t>(q.shape(1));
    of.num_kv_heads = static_cast<int64_t>(k_arena.shape(1));
    of.head_dim = static_cast<int64_t>(q.shape(2));
    check_heads(of.num_heads, of.num_kv_heads);
    of.q = heads(q);
    of.num_arena_rows = static_cast<int64_t>(k_arena.shape(0));
    of.keys = k_arena.data();
    of.values = v_arena.data();
    of.key_row = k_arena.stride(0);
    of.key_head = k_arena.stride(1);
    of.value_row = v_arena.stride(0);
    of.value_head = v_arena.stride(1);
    of.stored = stored(dtype);
    const size_t size = of.stored == cpo::Stored::float64 ? 8 : of.stored == cpo::Stored::float32 ? 4 : 2;
    check_arena(k_arena, k_new, slots, size, q.shape(2));
    check_arena(v_arena, v_new, slots, size, q.shape(2));
    of.scale = scale;
    of.window = window;
    of.softcap = softcap;
    of.sinks = sinks_of<T>(sinks, of.num_heads);
    of.out = heads(out);
    nb::gil_scoped_release unlocked;
    store_rows(k_arena, k_new, slots);
    store_rows(v_arena, v_new, slots);
    cpo::tree_decode(of, num_threads);
}

template <typename T>
void bind_attention(nb::module_& module) {
    module.def("tree_attention_forward", &tree_attention_forward<T>, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
               "start"_a.noconvert(), "stop"_a.noconvert(), "end"_a.noconvert(), "scale"_a, "window"_a, "softcap"_a,
               "sinks"_a.none(), "out"_a.noconvert(), "log_sum_exp"_a.noconvert(), "num_threads"_a,
               "q [T, H, D], k, v [T, Hkv, D], runs int32 [R] -> out [T, H, D] and log_sum_exp [H, T], written in place");
    module.def("tree_attention_backward", &tree_attention_backward<T>, "q"_a.noconvert(), "k"_a.noconvert(),
               "v"_a.noconvert(), "start"_a.noconvert(), "stop"_a.noconvert(), "end"_a.noconvert(), "scale"_a, "window"_a,
               "softcap"_a, "sinks"_a.none(), "log_sum_exp"_a.noconvert(), "delta"_a.noconvert(), "grad_out"_a.noconvert(),
               "grad_q"_a.none(), "grad_k"_a.none(), "grad_v"_a.none(), "num_threads"_a,
               "the gradients that are not None, written in place; delta [H, T] = sum over D of grad_out * out");
    module.def("tree_decode", &tree_decode<T>, "q"_a.noconvert(), "k_new"_a.noconvert(), "v_new"_a.noconvert(),
               "k_arena"_a.noconvert(), "v_arena"_a.noconvert(), "dtype"_a, "slots"_a.noconvert(), "start"_a.noconvert(),
               "count"_a.noconvert(), "node"_a.noconvert(), "offsets"_a.noconvert(), "own_start"_a.noconvert(),
               "own_count"_a.noconvert(), "scale"_a, "window"_a, "softcap"_a, "sinks"_a.none(), "out"_a.noconvert(), "num_threads"_a,
               "new keys and values into the arenas, then out [N, H, D] in place; row r reads intervals offsets[r] to "
               "offsets[r + 1] of arena rows and then its own");
}

void validate_subtree_end(Input<int32_t> subtree_end) {
    nb::gil_scoped_release unlocked;
    cpo::validate_subtree_end(subtree_end.data(), static_cast<int64_t>(subtree_end.shape(0)));
}

}  // namespace

NB_MODULE(_csrc, module) {
    module.doc() =
        "Host-side work that must not cost a GPU step (token trie to forest, pairs to micro-batches, block schedule), and "
        "attention on a CPU.";
    module.def("build_forest", &build_forest, "tokens"_a, "offsets"_a, "pad_to_multiple_of"_a,
               "tokens int64 [N], offsets int64 [S + 1] -> (tokens, position_ids, subtree_end, parent_row, path_rows, "
               "path_offsets, num_tokens)");
    module.def("split_pairs", &split_pairs, "tokens"_a, "offsets"_a, "prompt_lengths"_a, "max_tokens"_a,
               "tokens int64 [N], offsets int64 [2 P + 1], prompt_lengths int64 [P] -> (order, batch_offsets, batch_tokens)");
    module.def("tree_schedule", &tree_schedule, "subtree_end"_a, "block_q"_a, "block_kv"_a, "num_heads"_a, "num_kv_heads"_a,
               "window"_a = 0, "subtree_end int32 [T] -> the arrays of a TreeSchedule by name, and depths [T] with a window");
    module.def("instruction_sets", &cpo::instruction_sets, "those of this machine that attention was compiled for, best first");
    module.def("use_instruction_set", &cpo::use_instruction_set, "name"_a, "for all calls from now on; ValueError: it has none");
    bind_attention<float>(module);
    bind_attention<double>(module);
    module.def("validate_subtree_end", &validate_subtree_end, "subtree_end"_a,
               "ValueError unless subtree_end int32 [T] describes nested subtrees in depth-first preorder");
}
