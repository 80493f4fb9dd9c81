"""Time to turn one optimizer step's sequences into a forest: 64 sequences of 700 tokens, on one core.

Three shapes: the usual one (questions under one few-shot prompt, steps, siblings), no sharing at all, and all equal.
The whole of `build_forest` is timed, from Python lists of ints to torch tensors, and from tensors that exist already.
Before anything is printed every array is compared with a trie of Python dictionaries that shares no code with the
product.

    python -m benchmarks.forest [--repeats 50]
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core is the claim; torch reads this when it loads

import torch

from cpo_kernels.forest import Forest, build_forest

NUM_SEQUENCES = 64
SEQUENCE_TOKENS = 700
VOCAB_SIZE = 32_000
BOUND_MS = 3.0  # a 7B training step takes hundreds; the host must stay invisible


def shared_sequences(rng: random.Random) -> list[list[int]]:
    """Four questions under one 450-token prompt; per question four steps of 40 tokens, four siblings a step."""
    prompt = _ids(rng, 450)
    sequences = []
    for _ in range(4):
        trunk = prompt + _ids(rng, 50)
        for _ in range(4):
            siblings = [_ids(rng, 40) for _ in range(4)]
            sequences += [(trunk + sibling + _ids(rng, SEQUENCE_TOKENS))[:SEQUENCE_TOKENS] for sibling in siblings]
            trunk = trunk + siblings[0]
    return sequences


def unshared_sequences(rng: random.Random) -> list[list[int]]:
    """The worst case: every token is a row."""
    return [[row, *_ids(rng, SEQUENCE_TOKENS - 1)] for row in range(NUM_SEQUENCES)]


def equal_sequences(rng: random.Random) -> list[list[int]]:
    """The most comparisons: every token is shared by all."""
    return [_ids(rng, SEQUENCE_TOKENS)] * NUM_SEQUENCES


def _ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def assert_exact(forest: Forest, sequences: list[list[int]]) -> None:
    """Compare every array with a trie of dictionaries; AssertionError names the array."""
    tokens, parents, depths, children = [-1], [-1], [-1], [{}]  # node 0 is above the roots
    ends: list[list[int]] = []  # nodes of each sequence
    for sequence in sequences:
        node, path = 0, []
        for token in sequence:
            if token not in children[node]:
                children[node][token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depths.append(depths[node] + 1)
                children.append({})
            node = children[node][token]
            path.append(node)
        ends.append(path)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(children[node].values()))
    row_of = {node: row - 1 for row, node in enumerate(order)}
    size = [1] * len(tokens)
    for node in reversed(order[1:]):
        size[parents[node]] += size[node]
    line = order[1:]
    expected = {
        "tokens": [tokens[node] for node in line],
        "position_ids": [depths[node] for node in line],
        "parent_row": [row_of[parents[node]] for node in line],
        "subtree_end": [row_of[node] + size[node] for node in line],
        "path_rows": [row_of[node] for path in ends for node in path],
        "path_offsets": [sum(map(len, sequences[:s])) for s in range(len(sequences) + 1)],
    }
    for name, values in expected.items():
        assert getattr(forest, name).tolist() == values, f"{name} differs from the dictionary trie"
    assert forest.num_tokens == len(line)


def median_ms(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and worst milliseconds of `repeats` calls after one unmeasured one."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return times[len(times) // 2], times[-1]


def main() -> int:
    """Check, time, print a table and a JSON line, append the line to results/forest.jsonl; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    cases = {"shared": shared_sequences, "unshared": unshared_sequences, "equal": equal_sequences}
    results = {}
    for name, make in cases.items():
        sequences = make(random.Random(0))
        assert [len(s) for s in sequences] == [SEQUENCE_TOKENS] * NUM_SEQUENCES
        forest = build_forest(sequences)
        assert_exact(forest, sequences)
        tensors = [torch.tensor(s) for s in sequences]
        lists_ms, lists_max_ms = median_ms(lambda s=sequences: build_forest(s), arguments.repeats)
        tensors_ms, _ = median_ms(lambda s=tensors: build_forest(s), arguments.repeats)
        schedule_ms, _ = median_ms(forest.schedule, arguments.repeats)
        results[name] = {
            "num_rows": forest.num_tokens,
            "from_lists_ms": round(lists_ms, 3),
            "from_lists_max_ms": round(lists_max_ms, 3),
            "from_tensors_ms": round(tensors_ms, 3),
            "schedule_ms": round(schedule_ms, 3),
        }

    sys.stdout.write(
        f"{NUM_SEQUENCES} sequences of {SEQUENCE_TOKENS} tokens, one core, median of {arguments.repeats}\n"
    )
    sys.stdout.write(f"{'case':10}{'rows':>8}{'lists ms':>10}{'worst':>8}{'tensors ms':>12}{'schedule ms':>13}\n")
    for name, row in results.items():
        sys.stdout.write(
            f"{name:10}{row['num_rows']:8d}{row['from_lists_ms']:10.3f}{row['from_lists_max_ms']:8.3f}"
            f"{row['from_tensors_ms']:12.3f}{row['schedule_ms']:13.3f}\n"
        )
    record = {
        "benchmark": "forest",
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python -m benchmarks.forest",
        "machine": _processor(),
        "torch": torch.__version__,
        "exact": True,
        "bound_ms": BOUND_MS,
        "results": results,
    }
    line = json.dumps(record)
    sys.stdout.write(line + "\n")
    if not arguments.no_record:
        folder = Path(os.environ.get("CPO_FAST_RESULTS") or Path(__file__).parent / "results")
        with open(folder / "forest.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    missed = [name for name, row in results.items() if row["from_lists_ms"] > BOUND_MS]
    if missed:
        sys.stderr.write(f"over {BOUND_MS} ms: {', '.join(missed)}\n")
    return 1 if missed else 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
