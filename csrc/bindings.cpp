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

nb::tuple build_forest(Input<int64_t> tokens, Input<int64_t> offsets, int64_t pad_to_multiple_of) {
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
    cpo::Forest forest;
    {
        nb::gil_scoped_release unlocked;
        forest = cpo::build_forest(tokens.data(), at, num_offsets - 1, pad_to_multiple_of);
    }
    const Shared<cpo::Forest> shared(std::move(forest));
    return nb::make_tuple(shared.view(&cpo::Forest::tokens), shared.view(&cpo::Forest::position_ids),
                          shared.view(&cpo::Forest::subtree_end), shared.view(&cpo::Forest::parent_row),
                          shared.view(&cpo::Forest::path_rows), shared.view(&cpo::Forest::path_offsets),
                          (*shared).num_tokens);
}

nb::dict tree_schedule(Input<int32_t> subtree_end, int64_t block_q, int64_t block_kv) {
    cpo::Schedule schedule;
    {
        nb::gil_scoped_release unlocked;
        schedule = cpo::tree_schedule(subtree_end.data(), static_cast<int64_t>(subtree_end.shape(0)), block_q, block_kv);
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
    return arrays;
}

void validate_subtree_end(Input<int32_t> subtree_end) {
    nb::gil_scoped_release unlocked;
    cpo::validate_subtree_end(subtree_end.data(), static_cast<int64_t>(subtree_end.shape(0)));
}

}  // namespace

NB_MODULE(_csrc, module) {
    module.doc() = "Host-side work that must not cost a GPU step: token trie to forest, block schedule.";
    module.def("build_forest", &build_forest, "tokens"_a, "offsets"_a, "pad_to_multiple_of"_a,
               "tokens int64 [N], offsets int64 [S + 1] -> (tokens, position_ids, subtree_end, parent_row, path_rows, "
               "path_offsets, num_tokens)");
    module.def("tree_schedule", &tree_schedule, "subtree_end"_a, "block_q"_a, "block_kv"_a,
               "subtree_end int32 [T] -> the arrays of a TreeSchedule by name");
    module.def("validate_subtree_end", &validate_subtree_end, "subtree_end"_a,
               "ValueError unless subtree_end int32 [T] describes nested subtrees in depth-first preorder");
}
