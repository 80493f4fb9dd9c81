// The trie is held as a radix tree: a node is a run of tokens without a branch, named by its place in the input. A
// sequence then costs one comparison per shared token and one hash lookup per branch that it passes. The tokens below
// its last branch become one node without being looked at. There are at most two nodes a sequence, so layout is a copy
// of runs. Nothing recurses: depth is bounded by memory alone.

#include "forest.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace cpo {
namespace {

constexpr int32_t kNone = -1;
constexpr int32_t kTop = 0;  // the empty node above every root

struct Node {
    int64_t begin = 0;  // its run is tokens[begin : begin + length] of the input
    int64_t length = 0;
    int32_t parent = kNone;
    int32_t first_child = kNone;
    int32_t last_child = kNone;
    int32_t next = kNone;      // siblings in order of first appearance
    int32_t previous = kNone;
    int32_t row = 0;           // first row of the run, set by the layout
};

struct ChildKey {
    int32_t parent;
    int32_t token;  // first token of the child: siblings differ there
    bool operator==(const ChildKey& other) const { return parent == other.parent && token == other.token; }
};

struct ChildKeyHash {
    // splitmix64's finalizer: dense node numbers and dense token ids must not collide in the low bits
    size_t operator()(const ChildKey& key) const {
        uint64_t x = (static_cast<uint64_t>(static_cast<uint32_t>(key.parent)) << 32) | static_cast<uint32_t>(key.token);
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
        return static_cast<size_t>(x ^ (x >> 31));
    }
};

class RadixTree {
public:
    explicit RadixTree(const int64_t* tokens) : tokens_(tokens) { nodes_.emplace_back(); }

    void reserve(int64_t num_sequences) {
        nodes_.reserve(static_cast<size_t>(2 * num_sequences + 1));
        children_.reserve(static_cast<size_t>(2 * num_sequences));
    }

    // Adds tokens[begin : end] and returns the node whose run ends with the sequence's last token.
    int32_t insert(int64_t begin, int64_t end) {
        int32_t node = kTop;
        while (begin < end) {
            const auto found = children_.find(ChildKey{node, token(begin)});
            if (found == children_.end()) {
                return append_child(node, begin, end - begin);
            }
            const int32_t child = found->second;
            const int64_t* run = tokens_ + nodes_[child].begin;
            const int64_t common = std::min(nodes_[child].length, end - begin);
            const int64_t shared = std::mismatch(run, run + common, tokens_ + begin).first - run;
            node = shared < nodes_[child].length ? split(child, shared) : child;
            begin += shared;
        }
        return node;
    }

    std::vector<Node>& nodes() { return nodes_; }

    // Tokens of the trie: rows of its forest.
    int64_t num_tokens() const { return num_tokens_; }

private:
    int32_t token(int64_t place) const { return static_cast<int32_t>(tokens_[place]); }

    int32_t append_child(int32_t parent, int64_t begin, int64_t length) {
        const auto child = static_cast<int32_t>(nodes_.size());
        Node node;
        node.begin = begin;
        node.length = length;
        node.parent = parent;
        node.previous = nodes_[parent].last_child;
        nodes_.push_back(node);
        (node.previous == kNone ? nodes_[parent].first_child : nodes_[node.previous].next) = child;
        nodes_[parent].last_child = child;
        children_.emplace(ChildKey{parent, token(begin)}, child);
        num_tokens_ += length;
        return child;
    }

    // Gives the first `length` tokens of `lower` to a new node in its place. `lower` keeps its number, so its children
    // and the sequences that end in it stay true.
    int32_t split(int32_t lower, int64_t length) {
        const auto upper = static_cast<int32_t>(nodes_.size());
        Node node = nodes_[lower];
        node.length = length;
        node.first_child = node.last_child = lower;
        nodes_.push_back(node);
        (node.previous == kNone ? nodes_[node.parent].first_child : nodes_[node.previous].next) = upper;
        (node.next == kNone ? nodes_[node.parent].last_child : nodes_[node.next].previous) = upper;
        children_[ChildKey{node.parent, token(node.begin)}] = upper;

        Node& below = nodes_[lower];
        below.begin += length;
        below.length -= length;
        below.parent = upper;
        below.previous = below.next = kNone;
        children_.emplace(ChildKey{upper, token(below.begin)}, lower);
        return upper;
    }

    const int64_t* tokens_;
    int64_t num_tokens_ = 0;
    std::vector<Node> nodes_;
    std::unordered_map<ChildKey, int32_t, ChildKeyHash> children_;
};

// Throws, naming sequence s, for an id of it outside [0, 2^31).
void check_ids(const int64_t* tokens, const int64_t* offsets, int64_t s) {
    constexpr int64_t kMaxId = std::numeric_limits<int32_t>::max();
    // a sum of flags vectorises where a search does not, so the search runs only to name the culprit
    int64_t num_bad = 0;
    for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
        num_bad += static_cast<uint64_t>(tokens[i]) > static_cast<uint64_t>(kMaxId);
    }
    for (int64_t i = offsets[s]; num_bad > 0 && i < offsets[s + 1]; ++i) {
        if (tokens[i] < 0 || tokens[i] > kMaxId) {
            throw std::invalid_argument("sequence " + std::to_string(s) + ": expected token ids in [0, 2147483647], got " +
                                        std::to_string(tokens[i]) + " at token " + std::to_string(i - offsets[s]));
        }
    }
}

void check_number(int64_t num_sequences) {
    constexpr int64_t kMaxSequences = std::numeric_limits<int32_t>::max() / 2;  // two nodes each, numbered in 32 bits
    if (num_sequences > kMaxSequences) {
        throw std::invalid_argument("expected at most 1073741823 sequences, got " + std::to_string(num_sequences));
    }
}

// Depth-first preorder over the runs. All rows of a run have the same subtree_end: nothing branches inside it.
void lay_out(std::vector<Node>& nodes, const int64_t* tokens, Forest& forest) {
    int32_t row = 0;
    int32_t depth = 0;  // tokens above the run at hand
    int32_t at = nodes[kTop].first_child;
    while (at != kNone) {
        Node& node = nodes[at];
        const auto length = static_cast<int32_t>(node.length);
        const Node& parent = nodes[node.parent];
        node.row = row;
        for (int32_t i = 0; i < length; ++i) {
            forest.tokens[row + i] = static_cast<int32_t>(tokens[node.begin + i]);
            forest.position_ids[row + i] = depth + i;
            forest.parent_row[row + i] = row + i - 1;
        }
        forest.parent_row[row] = node.parent == kTop ? -1 : parent.row + static_cast<int32_t>(parent.length) - 1;
        row += length;
        depth += length;
        if (node.first_child != kNone) {
            at = node.first_child;
            continue;
        }
        while (at != kTop) {  // leave every run that is complete, up to the next sibling
            const Node& done = nodes[at];
            std::fill_n(forest.subtree_end.begin() + done.row, done.length, row);
            depth -= static_cast<int32_t>(done.length);
            if (done.next != kNone) {
                break;
            }
            at = done.parent;
        }
        at = at == kTop ? kNone : nodes[at].next;
    }
}

}  // namespace

Forest build_forest(const int64_t* tokens, const int64_t* offsets, int64_t num_sequences, int64_t pad_to_multiple_of) {
    constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
    if (pad_to_multiple_of < 1 || pad_to_multiple_of > kMaxRows) {
        throw std::invalid_argument("expected pad_to_multiple_of in [1, 2147483647], got " +
                                    std::to_string(pad_to_multiple_of));
    }
    check_number(num_sequences);
    for (int64_t s = 0; s < num_sequences; ++s) {
        if (offsets[s] >= offsets[s + 1]) {
            throw std::invalid_argument("sequence " + std::to_string(s) + " is empty; expected at least one token");
        }
        check_ids(tokens, offsets, s);
    }

    RadixTree tree(tokens);
    tree.reserve(num_sequences);
    std::vector<int32_t> last_node(static_cast<size_t>(num_sequences));
    for (int64_t s = 0; s < num_sequences; ++s) {
        last_node[s] = tree.insert(offsets[s], offsets[s + 1]);
    }

    Forest forest;
    forest.num_tokens = tree.num_tokens();
    const int64_t num_rows = (forest.num_tokens + pad_to_multiple_of - 1) / pad_to_multiple_of * pad_to_multiple_of;
    if (num_rows > kMaxRows) {
        throw std::invalid_argument("expected at most 2147483647 rows after padding, got " + std::to_string(num_rows));
    }
    const auto size = static_cast<size_t>(num_rows);
    forest.tokens.resize(size);
    forest.position_ids.resize(size);
    forest.subtree_end.resize(size);
    forest.parent_row.resize(size);
    lay_out(tree.nodes(), tokens, forest);
    for (int64_t row = forest.num_tokens; row < num_rows; ++row) {
        forest.parent_row[row] = -1;
        forest.subtree_end[row] = static_cast<int32_t>(row + 1);
    }

    forest.path_offsets.assign(offsets, offsets + num_sequences + 1);
    forest.path_rows.resize(static_cast<size_t>(offsets[num_sequences]));
    for (int64_t s = 0; s < num_sequences; ++s) {
        int64_t end = offsets[s + 1];
        for (int32_t at = last_node[s]; at != kTop; at = tree.nodes()[at].parent) {
            const Node& node = tree.nodes()[at];
            end -= node.length;
            std::iota(forest.path_rows.begin() + end, forest.path_rows.begin() + end + node.length, node.row);
        }
    }
    return forest;
}

PairSplit split_pairs(const int64_t* tokens, const int64_t* offsets, const int64_t* prompt_lengths, int64_t num_pairs,
                      int64_t max_tokens) {
    check_number(2 * num_pairs);
    for (int64_t s = 0; s < 2 * num_pairs; ++s) {
        check_ids(tokens, offsets, s);
    }
    PairSplit split;
    split.order.resize(static_cast<size_t>(num_pairs));
    std::iota(split.order.begin(), split.order.end(), 0);
    std::stable_sort(split.order.begin(), split.order.end(), [&](int64_t a, int64_t b) {
        const int64_t* prompt_a = tokens + offsets[2 * a];
        const int64_t* prompt_b = tokens + offsets[2 * b];
        return std::lexicographical_compare(prompt_a, prompt_a + prompt_lengths[a], prompt_b, prompt_b + prompt_lengths[b]);
    });

    RadixTree tree(tokens);
    const auto insert = [&](int64_t pair) {
        tree.insert(offsets[2 * pair], offsets[2 * pair + 1]);
        tree.insert(offsets[2 * pair + 1], offsets[2 * pair + 2]);
    };
    for (int64_t place = 0; place < num_pairs; ++place) {
        const int64_t num_before = tree.num_tokens();
        insert(split.order[place]);
        if (place == 0 || tree.num_tokens() > max_tokens) {  // what was added is left out with the old tree
            if (place > 0) {
                split.batch_tokens.push_back(num_before);
            }
            split.batch_offsets.push_back(place);
            tree = RadixTree(tokens);
            insert(split.order[place]);
        }
    }
    if (num_pairs > 0) {
        split.batch_tokens.push_back(tree.num_tokens());
    }
    split.batch_offsets.push_back(num_pairs);
    return split;
}

}  // namespace cpo
