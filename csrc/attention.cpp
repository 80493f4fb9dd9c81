#include "attention.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#if defined(CPO_X86_SETS)
#include <cpuid.h>
#endif

namespace cpo {

namespace {

constexpr int64_t vector_bytes = 64;
// products of a query and a key's element that pay for a thread
constexpr int64_t products_per_thread = int64_t{1} << 23;
constexpr int64_t part_bytes = int64_t{1} << 20;  // of keys and values: half a core's second cache

enum class Set { baseline, avx2, avx512 };

#if defined(CPO_X86_SETS)
struct Machine {
    bool avx2, avx512;  // with what csrc/CMakeLists.txt compiles beside each
};

// By the processor's own word and the system's, which must keep the registers. `__builtin_cpu_supports` is always 0 where zig
// links, whose library lacks what it reads.
Machine this_machine() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        return {};
    }
    const auto all = [](unsigned word, std::initializer_list<int> bits) {
        return std::all_of(bits.begin(), bits.end(), [&](int bit) { return (word >> bit & 1U) != 0; });
    };
    constexpr int fma = 12, xgetbv = 27, avx = 28;
    if (!all(ecx, {fma, xgetbv, avx}) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        return {};
    }
    unsigned kept = 0, above = 0;
    __asm__ volatile("xgetbv" : "=a"(kept), "=d"(above) : "c"(0));
    constexpr int avx2 = 5, avx512f = 16, avx512dq = 17, avx512vl = 31;
    const bool has_avx2 = all(kept, {1, 2}) && all(ebx, {avx2});
    return {has_avx2, has_avx2 && all(kept, {5, 6, 7}) && all(ebx, {avx512f, avx512dq, avx512vl})};
}
#endif

// Of the running machine, best first.
std::vector<std::pair<Set, std::string>> supported_sets() {
    std::vector<std::pair<Set, std::string>> sets;
#if defined(CPO_X86_SETS)
    const Machine machine = this_machine();
    if (machine.avx512) {
        sets.emplace_back(Set::avx512, "avx512");
    }
    if (machine.avx2) {
        sets.emplace_back(Set::avx2, "avx2");
    }
#endif
    sets.emplace_back(Set::baseline, "baseline");
    return sets;
}

std::atomic<Set>& chosen_set() {
    static std::atomic<Set> chosen{supported_sets().front().first};
    return chosen;
}

#if defined(CPO_X86_SETS)
#define CPO_CALL(function, ...)                       \
    if (set == Set::avx512) {                         \
        avx512::function(__VA_ARGS__);                \
    } else if (set == Set::avx2) {                    \
        avx2::function(__VA_ARGS__);                  \
    } else {                                          \
        baseline::function(__VA_ARGS__);              \
    }
#else
#define CPO_CALL(function, ...) static_cast<void>(set), baseline::function(__VA_ARGS__)
#endif

// Memory that begins at a whole vector.
template <typename T>
class Buffer {
public:
    explicit Buffer(int64_t count) : values_(static_cast<size_t>(count) + vector_bytes / sizeof(T)) {}

    T* data() {
        const auto address = reinterpret_cast<uintptr_t>(values_.data());
        return values_.data() + (vector_bytes - address % vector_bytes) % vector_bytes / sizeof(T);
    }

private:
    std::vector<T> values_;
};

// run(task, scratch) for every task, on so many threads or as many as can be started. Which thread runs a task changes no
// result. What one of them throws, as std::bad_alloc for its scratch, is thrown here when all have ended.
template <typename T, typename Run>
void share_out(int64_t num_tasks, int num_threads, int64_t num_scratch, const Run& run) {
    num_threads = static_cast<int>(std::min<int64_t>(num_threads, num_tasks));
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    const auto work = [&] {
        try {
            Buffer<T> scratch(num_scratch);
            for (int64_t task = next++; task < num_tasks; task = next++) {
                run(task, scratch.data());
            }
        } catch (...) {
            next = num_tasks;
            if (!failed.test_and_set()) {
                failure = std::current_exception();
            }
        }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(std::max(num_threads, 1)));
    try {
        for (int thread = 1; thread < num_threads; ++thread) {
            others.emplace_back(work);
        }
    } catch (const std::system_error&) {  // the system starts no more
    } catch (const std::bad_alloc&) {
    }
    work();
    for (std::thread& other : others) {
        other.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

void expect(bool holds, const char* message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

int threads_for(int64_t num_products, int num_threads) {
    return static_cast<int>(std::clamp<int64_t>(num_products / products_per_thread, 1, std::max(1, num_threads)));
}

// Products of one head with every visible pair of a forest.
int64_t visible_products(const Runs& runs, int64_t head_dim) {
    int64_t pairs = 0;
    for (int64_t run = 0; run < runs.num_runs; ++run) {
        pairs += static_cast<int64_t>(runs.stop[run] - runs.start[run]) * (runs.end[run] - runs.start[run]);
    }
    return pairs * head_dim;
}

// Where the trees of a forest begin, in runs, and the number of runs at the end.
std::vector<int64_t> tree_starts(const Runs& runs) {
    std::vector<int64_t> starts;
    int64_t covered = 0;
    for (int64_t run = 0; run < runs.num_runs; ++run) {
        if (runs.start[run] >= covered) {
            starts.push_back(run);
            covered = runs.end[run];
        }
    }
    starts.push_back(runs.num_runs);
    return starts;
}

// In tokens.
int64_t longest_path(const Runs& runs) {
    std::vector<std::pair<int64_t, int64_t>> open;  // where a subtree ends, and the depth below the run
    int64_t longest = 0;
    for (int64_t run = 0; run < runs.num_runs; ++run) {
        while (!open.empty() && open.back().first <= runs.start[run]) {
            open.pop_back();
        }
        const int64_t depth = (open.empty() ? 0 : open.back().second) + runs.stop[run] - runs.start[run];
        open.emplace_back(runs.end[run], depth);
        longest = std::max(longest, depth);
    }
    return longest;
}

// Numbers of scratch that one thread needs.
template <typename T>
int64_t tree_attention_scratch(const TreeAttention<T>& of, bool backward) {
    const int64_t width = vector_bytes / static_cast<int64_t>(sizeof(T));
    const int64_t dim = of.head_dim + width, longest = of.longest_path + 3 * width;
    const int64_t block = std::max<int64_t>(64, of.num_heads / of.num_kv_heads);
    return backward ? 6 * longest * dim + 3 * block * dim + 2 * block * longest
                    : 3 * longest * dim + 2 * block * dim + block * (longest + 1);
}

void check_runs(const Runs& runs, int64_t num_rows) {
    int64_t covered = 0;
    for (int64_t run = 0; run < runs.num_runs; ++run) {
        expect(runs.start[run] == covered && runs.stop[run] > covered && runs.end[run] >= runs.stop[run],
               "expected runs that follow one another, each of a row at least");
        covered = runs.stop[run];
    }
    expect(covered == num_rows, "expected runs that cover all rows");
}

// What no row may read past, and the most keys of any row.
template <typename T>
void check_rows(TreeDecode<T>& of) {
    DecodeRows& rows = of.rows;
    const auto fits = [&](int64_t start, int64_t count) {
        return count >= 0 && start >= 0 && start <= of.num_arena_rows && count <= of.num_arena_rows - start;
    };
    expect(rows.offsets[0] == 0 && rows.offsets[rows.num_rows] == rows.num_intervals, "expected offsets of all intervals");
    for (int64_t row = 0; row < rows.num_rows; ++row) {
        int64_t nodes = 0;
        expect(rows.offsets[row] <= rows.offsets[row + 1] && rows.offsets[row + 1] <= rows.num_intervals,
               "expected ascending offsets");
        for (int64_t i = rows.offsets[row]; i < rows.offsets[row + 1]; ++i) {
            expect(fits(rows.start[i], rows.count[i]), "tree_decode: the plan names rows that the arena does not have");
            nodes += rows.count[i];
        }
        expect(rows.own_count[row] == 0 || fits(rows.own_start[row], rows.own_count[row]),
               "tree_decode: the plan names rows that the arena does not have");
        rows.longest_nodes = std::max(rows.longest_nodes, nodes);
        rows.longest_own = std::max(rows.longest_own, rows.own_count[row]);
    }
}

template <typename T>
void each_tree(TreeAttention<T> of, int num_threads, bool backward) {
    check_runs(of.runs, of.num_rows);
    const Set set = chosen_set();
    const std::vector<int64_t> starts = tree_starts(of.runs);
    of.longest_path = longest_path(of.runs);
    const auto num_trees = static_cast<int64_t>(starts.size()) - 1;
    num_threads = threads_for(visible_products(of.runs, of.head_dim) * of.num_heads, num_threads);
    share_out<T>(num_trees * of.num_kv_heads, num_threads, tree_attention_scratch(of, backward), [&](int64_t task, T* scratch) {
        const int64_t tree = task / of.num_kv_heads, kv_head = task % of.num_kv_heads;
        const int64_t first = starts[tree], last = starts[tree + 1];
        if (backward) {
            CPO_CALL(backward_tree, of, first, last, kv_head, scratch);
        } else {
            CPO_CALL(forward_tree, of, first, last, kv_head, scratch);
        }
    });
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto& [set, name] : supported_sets()) {
        names.push_back(name);
    }
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const auto& [set, other] : supported_sets()) {
        if (other == name) {
            chosen_set() = set;
            return;
        }
    }
    throw std::invalid_argument("this machine has no instruction set " + name);
}

template <typename T>
void tree_attention_forward(TreeAttention<T> of, int num_threads) {
    each_tree(of, num_threads, false);
}

template <typename T>
void tree_attention_backward(TreeAttention<T> of, int num_threads) {
    each_tree(of, num_threads, true);
}

template <typename T>
void tree_decode(TreeDecode<T> of, int num_threads) {
    check_rows(of);
    const Set set = chosen_set();
    int64_t num_keys = 0, num_read = 0;  // all rows', and those that the row before does not read
    for (int64_t row = 0; row < of.rows.num_rows; ++row) {
        const int64_t before = row > 0 ? of.rows.offsets[row - 1] : 0, first = of.rows.offsets[row];
        for (int64_t i = first; i < of.rows.offsets[row + 1]; ++i) {
            const int64_t other = before + i - first;
            num_keys += of.rows.count[i];
            num_read += other < first && of.rows.node[other] == of.rows.node[i] ? 0 : of.rows.count[i];
        }
        num_keys += of.rows.own_count[row];
        num_read += of.rows.own_count[row];
    }
    num_threads = threads_for(2 * num_keys * of.head_dim * of.num_heads, num_threads);
    // parts of rows whose keys and values stay in a core's cache from head to head, and enough of them for all threads
    const int64_t num_bytes = 2 * num_read * of.head_dim * of.num_kv_heads * static_cast<int64_t>(sizeof(T));
    const int64_t for_threads = num_threads == 1 ? 1 : 4 * num_threads / of.num_kv_heads;
    // each part copies the path of its first rows again, which must be little beside the rest
    const int64_t for_cache = std::min(num_bytes / part_bytes, num_read / (4 * of.rows.longest_nodes + 1));
    const int64_t wanted = std::max({int64_t{1}, for_cache, for_threads});
    const int64_t step = std::max<int64_t>(1, (of.rows.num_rows + wanted - 1) / wanted);
    const int64_t num_parts = (of.rows.num_rows + step - 1) / step;
    const int64_t width = vector_bytes / static_cast<int64_t>(sizeof(T));
    const int64_t dim = (of.head_dim + width - 1) / width * width, longest = decode_longest(of, width);
    const int64_t block = decode_block(of), num_scratch = 3 * longest * dim + block * (2 * dim + longest + 1) + 2 * decode_chunk * dim;
    share_out<T>(num_parts * of.num_kv_heads, num_threads, num_scratch, [&](int64_t task, T* scratch) {
        const int64_t kv_head = task % of.num_kv_heads, first = task / of.num_kv_heads * step;
        const int64_t last = std::min(first + step, of.rows.num_rows);
        CPO_CALL(decode_rows, of, first, last, kv_head, scratch);
    });
}

template void tree_attention_forward<float>(TreeAttention<float>, int);
template void tree_attention_forward<double>(TreeAttention<double>, int);
template void tree_attention_backward<float>(TreeAttention<float>, int);
template void tree_attention_backward<double>(TreeAttention<double>, int);
template void tree_decode<float>(TreeDecode<float>, int);
template void tree_decode<double>(TreeDecode<double>, int);

}  // namespace cpo
