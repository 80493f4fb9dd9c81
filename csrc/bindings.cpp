// cpo_kernels._csrc: numpy arrays in, numpy arrays out. The arrays of one result share one owner and are not copied;
// the interpreter lock is released while a result is computed. std::invalid_argument becomes ValueError.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <utility>

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

void validate_subtree_end(Input<int32_t> subtree_end) {
    nb::gil_scoped_release unlocked;
    cpo::validate_subtree_end(subtree_end.data(), static_cast<int64_t>(subtree_end.shape(0)));
}

}  // namespace

NB_MODULE(_csrc, module) {
    module.doc() = "Host-side work that must not cost a GPU step: token trie to forest, pairs to micro-batches, block schedule.";
    module.def("build_forest", &build_forest, "tokens"_a, "offsets"_a, "pad_to_multiple_of"_a,
               "tokens int64 [N], offsets int64 [S + 1] -> (tokens, position_ids, subtree_end, parent_row, path_rows, "
               "path_offsets, num_tokens)");
    module.def("split_pairs", &split_pairs, "tokens"_a, "offsets"_a, "prompt_lengths"_a, "max_tokens"_a,
               "tokens int64 [N], offsets int64 [2 P + 1], prompt_lengths int64 [P] -> (order, batch_offsets, batch_tokens)");
    module.def("tree_schedule", &tree_schedule, "subtree_end"_a, "block_q"_a, "block_kv"_a, "num_heads"_a, "num_kv_heads"_a,
               "window"_a = 0, "subtree_end int32 [T] -> the arrays of a TreeSchedule by name, and depths [T] with a window");
    module.def("validate_subtree_end", &validate_subtree_end, "subtree_end"_a,
               "ValueError unless subtree_end int32 [T] describes nested subtrees in depth-first preorder");
}
