// For query rows [m0, m1) and keys [n0, n1) of a forest, with emin and emax the least and greatest subtree_end in the
// key block, the block
//     is skipped iff n0 >= m1 or emax <= m0   (a row that reaches the block's end sees the key that reaches the row)
//     is full    iff n1 - 1 <= m0 and emin >= m1
// and is partial otherwise. Both tests are exact. For the same reason the rows that see a key block are one range,
// [n0, emax), and those that see all of it are [n1 - 1, emin); the lists below are filled from the first, which makes
// the work proportional to what is visited. n1 is n0 + block_kv even where the line ends earlier: a ragged key block is
// never full, so a kernel needs no bounds check on the keys of a full one.
//
// dK and dV of a key block sum over its query range and over the G query heads of a key head. A prompt's blocks are seen
// by nearly every row while most are seen by a few: left whole, they are the programs that all others wait for, the more
// so the more query heads they walk through and the fewer key heads share the card. A range of more query blocks than
// kMinPartBlocks / G and than its share, one of kNumShares / key heads, of all of them is cut into the fewest equal parts
// within that limit. The parts times the key heads are then fewer than 2 * kNumShares whatever the line: a cut block
// exceeds a share, so it has more than half a share in every part. A long chain stays whole.
//
// Under a window of W, row i sees key j of those iff depth[i] - depth[j] < W. All keys of a block that a row at or past
// its end sees lie on the path of the block's last row, one below the other. So a row sees some key of a block iff it sees
// the lowest of them that still has it below, and all keys iff it sees the first: two tests a row, exact like those above.
// What they leave of a block's rows is no range, because depth falls where a branch ends. dK and dV walk the spans of
// query blocks that hold a row which sees the block, those less than kMinGapBlocks apart as one, and mask. Every gap between
// spans may be another part or two. Those beyond the longest kNumShares / key heads, or the longest of one for
// kBlocksPerGap key blocks where these are more, are therefore walked too. A line of K key blocks has so fewer parts
// than 2 * kNumShares / key heads + 2 * max(kNumShares / key heads, K / kBlocksPerGap), whatever its branches.

#include "schedule.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace cpo {

namespace {

constexpr int64_t kMinPartBlocks = 16;  // writing and reading a part's float32 sums costs about as much as two blocks
constexpr int64_t kNumShares = 1024;    // programs that fill a card several times; bounds the memory that parts take
constexpr int64_t kMinGapBlocks = 4;    // hidden query blocks that are worth another part
constexpr int64_t kBlocksPerGap = 8;    // parts of gaps then take no more than a fourth of the rows of dK and dV

struct Span {  // of rows that a key block's dK and dV sum over
    int64_t start;
    int64_t stop;

    int64_t num_blocks(int64_t block_q) const { return (stop - start + block_q - 1) / block_q; }
};

struct Visit {
    int64_t q_block;
    int64_t kv_block;
    bool full;
};

// Cuts the query rows of every key block into pieces of work. A span starts whole query blocks after the one before it.
void cut_work(Schedule& schedule, const std::vector<std::vector<Span>>& spans, int64_t block_q, int64_t num_heads,
              int64_t num_kv_heads) {
    int64_t total = 0;
    for (const auto& of_block : spans) {
        for (const Span& span : of_block) {
            total += span.num_blocks(block_q);
        }
    }
    const int64_t group = num_heads / num_kv_heads;
    const int64_t limit =
        std::max((kMinPartBlocks + group - 1) / group, (total * num_kv_heads + kNumShares - 1) / kNumShares);
    int32_t num_parts = 0;
    schedule.split_offsets.push_back(0);
    for (size_t block = 0; block < spans.size(); ++block) {
        const size_t first = schedule.work_block.size();
        for (const Span& span : spans[block]) {
            const int64_t blocks = span.num_blocks(block_q);
            const int64_t pieces = (blocks + limit - 1) / limit;
            const int64_t rows = (blocks + pieces - 1) / pieces * block_q;
            for (int64_t start = span.start; start < span.stop; start += rows) {
                const int64_t stop = std::min(start + rows, span.stop);
                schedule.work_block.push_back(static_cast<int32_t>(block));
                schedule.work_start.push_back(static_cast<int32_t>(start));
                schedule.work_stop.push_back(static_cast<int32_t>(stop));
            }
        }
        const bool cut = schedule.work_block.size() - first > 1;
        for (size_t piece = first; piece < schedule.work_block.size(); ++piece) {
            schedule.work_part.push_back(cut ? num_parts++ : -1);
        }
        if (cut) {
            schedule.split_block.push_back(static_cast<int32_t>(block));
            schedule.split_offsets.push_back(num_parts);
        }
    }
}

// Joins spans over the shortest gaps until no more than `limit` gaps are left.
void join_spans(std::vector<std::vector<Span>>& spans, size_t limit) {
    std::vector<int64_t> gaps;
    for (const auto& of_block : spans) {
        for (size_t place = 1; place < of_block.size(); ++place) {
            gaps.push_back(of_block[place].start - of_block[place - 1].stop);
        }
    }
    if (gaps.size() <= limit) {
        return;
    }
    std::nth_element(gaps.begin(), gaps.begin() + static_cast<std::ptrdiff_t>(limit), gaps.end(), std::greater<>());
    const int64_t shortest = gaps[limit];  // of those left, which are all that are longer and as many as fit of its length
    size_t room = static_cast<size_t>(std::count(gaps.begin(), gaps.begin() + static_cast<std::ptrdiff_t>(limit), shortest));
    for (auto& of_block : spans) {
        size_t last = 0;
        for (size_t place = 1; place < of_block.size(); ++place) {
            const int64_t gap = of_block[place].start - of_block[last].stop;
            if (gap > shortest || (gap == shortest && room > 0)) {
                room -= gap == shortest;
                of_block[++last] = of_block[place];
            } else {
                of_block[last].stop = of_block[place].stop;
            }
        }
        of_block.erase(of_block.begin() + static_cast<std::ptrdiff_t>(last) + 1, of_block.end());
    }
}

// How many rows stand above each row on its own path.
std::vector<int32_t> path_depths(const int32_t* subtree_end, int64_t num_rows) {
    std::vector<int32_t> depths;
    std::vector<int32_t> open;  // ends of the rows above, the innermost last
    for (int64_t row = 0; row < num_rows; ++row) {
        while (!open.empty() && open.back() <= row) {
            open.pop_back();
        }
        depths.push_back(static_cast<int32_t>(open.size()));
        open.push_back(subtree_end[row]);
    }
    return depths;
}

// Narrows the ranges of one key block, keys [n0, last], to what a window leaves, appends its visits and returns its spans.
std::vector<Span> apply_window(Schedule& schedule, const int32_t* subtree_end, int64_t num_rows, int64_t block, int64_t last,
                               int64_t block_q, int64_t window, std::vector<Visit>& visits) {
    const std::vector<int32_t>& depths = schedule.depths;
    const int64_t n0 = schedule.kv_query_start[block];
    std::vector<int64_t> above;  // keys of the block on the path of its last row
    for (int64_t key = n0; key <= last; ++key) {
        while (!above.empty() && subtree_end[above.back()] <= key) {
            above.pop_back();
        }
        above.push_back(key);
    }
    const int64_t full_start = schedule.kv_full_start[block];
    const int64_t full_stop = schedule.kv_full_stop[block];
    int64_t full_run = full_start;  // one past the rows from full_start on that all see all keys
    int64_t num_seeing = 0;         // rows of the query block so far
    int64_t num_full = 0;
    int64_t query_stop = n0;
    std::vector<Span> spans;
    for (int64_t row = n0; row < schedule.kv_query_stop[block]; ++row) {
        while (row > last && subtree_end[above.back()] <= row) {
            above.pop_back();
        }
        const bool sees = row <= last || depths[row] - depths[above.back()] < window;
        const bool full = full_start <= row && row < full_stop && depths[row] - depths[n0] < window;
        if (sees) {
            query_stop = row + 1;
            const int64_t start = n0 + (row - n0) / block_q * block_q;  // the step of dK and dV
            if (spans.empty() || start - spans.back().stop >= kMinGapBlocks * block_q) {
                spans.push_back({start, start});
            }
            spans.back().stop = std::min<int64_t>(start + block_q, schedule.kv_query_stop[block]);
        }
        if (full && full_run == row) {
            full_run = row + 1;
        }
        num_seeing += sees;
        num_full += full;
        const int64_t m0 = row / block_q * block_q;
        const int64_t m1 = std::min(m0 + block_q, num_rows);
        if (row + 1 == m1 || row + 1 == schedule.kv_query_stop[block]) {
            if (num_seeing > 0) {
                visits.push_back({row / block_q, block, num_full == m1 - m0});
            }
            num_seeing = num_full = 0;
        }
    }
    schedule.kv_query_stop[block] = static_cast<int32_t>(query_stop);
    schedule.kv_full_stop[block] = static_cast<int32_t>(full_run);
    spans.back().stop = query_stop;
    return spans;
}

}  // namespace

void validate_subtree_end(const int32_t* subtree_end, int64_t num_rows) {
    std::vector<int32_t> open;  // ends of the subtrees that contain the row, the innermost last
    for (int64_t row = 0; row < num_rows; ++row) {
        const int32_t end = subtree_end[row];
        if (end <= row || end > num_rows) {
            throw std::invalid_argument("expected row < subtree_end[row] <= " + std::to_string(num_rows) + " at row " +
                                        std::to_string(row) + ", got " + std::to_string(end));
        }
        while (!open.empty() && open.back() <= row) {
            open.pop_back();
        }
        if (!open.empty() && end > open.back()) {
            throw std::invalid_argument("subtrees must nest: expected subtree_end <= " + std::to_string(open.back()) +
                                        " at row " + std::to_string(row) + ", got " + std::to_string(end));
        }
        if (open.empty() || end < open.back()) {  // an equal end needs no second entry
            open.push_back(end);
        }
    }
}

Schedule tree_schedule(const int32_t* subtree_end, int64_t num_rows, int64_t block_q, int64_t block_kv, int64_t num_heads,
                       int64_t num_kv_heads, int64_t window) {
    if (block_q < 1 || block_kv < 1) {
        throw std::invalid_argument("expected block_q >= 1 and block_kv >= 1, got " + std::to_string(block_q) + " and " +
                                    std::to_string(block_kv));
    }
    if (num_kv_heads < 1 || num_heads < num_kv_heads || num_heads % num_kv_heads != 0) {
        throw std::invalid_argument("expected heads that are a multiple of the key heads, got " +
                                    std::to_string(num_heads) + " and " + std::to_string(num_kv_heads));
    }
    if (window < 0) {
        throw std::invalid_argument("expected a window >= 1, or 0 for none, got " + std::to_string(window));
    }
    validate_subtree_end(subtree_end, num_rows);

    Schedule schedule;
    if (window > 0) {
        schedule.depths = path_depths(subtree_end, num_rows);
    }
    std::vector<std::vector<Span>> spans;
    std::vector<Visit> visits;  // under a window
    const int64_t num_q_blocks = num_rows / block_q + (num_rows % block_q != 0);
    const int64_t num_kv_blocks = num_rows / block_kv + (num_rows % block_kv != 0);
    for (int64_t block = 0; block < num_kv_blocks; ++block) {
        const int64_t n0 = block * block_kv;
        const bool ragged = block_kv > num_rows - n0;
        const int64_t last = ragged ? num_rows - 1 : n0 + block_kv - 1;
        const auto [least, greatest] = std::minmax_element(subtree_end + n0, subtree_end + last + 1);
        schedule.kv_query_start.push_back(static_cast<int32_t>(n0));
        schedule.kv_query_stop.push_back(*greatest);
        schedule.kv_full_start.push_back(static_cast<int32_t>(last));
        schedule.kv_full_stop.push_back(ragged ? static_cast<int32_t>(last) : std::max(*least, static_cast<int32_t>(last)));
        if (window > 0) {
            spans.push_back(apply_window(schedule, subtree_end, num_rows, block, last, block_q, window, visits));
        } else {
            spans.push_back({{n0, *greatest}});
        }
    }

    join_spans(spans, static_cast<size_t>(std::max(kNumShares / num_kv_heads, num_kv_blocks / kBlocksPerGap)));
    cut_work(schedule, spans, block_q, num_heads, num_kv_heads);

    // Two walks over the visited blocks: count, then place. Key blocks ascend within a query block by construction.
    std::vector<int64_t> num_full(static_cast<size_t>(num_q_blocks) + 1);
    std::vector<int64_t> num_partial(num_full.size());
    const auto for_each_visited = [&](const auto& visit) {
        if (window > 0) {
            for (const Visit& each : visits) {
                visit(each.q_block, each.kv_block, each.full);
            }
            return;
        }
        for (int64_t block = 0; block < num_kv_blocks; ++block) {
            const int64_t last_q = (schedule.kv_query_stop[block] - 1) / block_q;
            for (int64_t q = schedule.kv_query_start[block] / block_q; q <= last_q; ++q) {
                const int64_t m0 = q * block_q;
                const int64_t m1 = m0 + std::min(block_q, num_rows - m0);
                visit(q, block, schedule.kv_full_start[block] <= m0 && m1 <= schedule.kv_full_stop[block]);
            }
        }
    };
    for_each_visited([&](int64_t q, int64_t, bool full) { ++(full ? num_full : num_partial)[q + 1]; });
    for (int64_t q = 0; q < num_q_blocks; ++q) {
        num_full[q + 1] += num_full[q];
        num_partial[q + 1] += num_partial[q];
    }
    if (num_full.back() + num_partial.back() > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("more than 2147483647 blocks are visited; use larger blocks");
    }
    schedule.full_offsets.assign(num_full.begin(), num_full.end());
    schedule.partial_offsets.assign(num_partial.begin(), num_partial.end());
    schedule.full_blocks.resize(static_cast<size_t>(num_full.back()));
    schedule.partial_blocks.resize(static_cast<size_t>(num_partial.back()));
    for_each_visited([&](int64_t q, int64_t block, bool full) {
        const int64_t place = (full ? num_full : num_partial)[q]++;
        (full ? schedule.full_blocks : schedule.partial_blocks)[place] = static_cast<int32_t>(block);
    });

    for (int64_t row = 0; row < num_rows; ++row) {
        // an only child ends where its parent ends; a row that is no child ends after row, where the row before it ended
        if (row == 0 || subtree_end[row] != subtree_end[row - 1]) {
            if (row > 0) {
                schedule.segment_stop.push_back(static_cast<int32_t>(row));
            }
            schedule.segment_start.push_back(static_cast<int32_t>(row));
            schedule.segment_end.push_back(subtree_end[row]);
        }
    }
    if (num_rows > 0) {
        schedule.segment_stop.push_back(static_cast<int32_t>(num_rows));
    }
    return schedule;
}

}  // namespace cpo
