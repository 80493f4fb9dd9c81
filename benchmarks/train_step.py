"""One DPO step on a search tree: the tree packed once, against a pair of padded rows at a time, and against TRL.

The workload: a prompt of about 450 tokens, three steps, at each step one winning thought and nine that lost (about 40
tokens each): 27 pairs. Forward and backward of a LoRA policy in fp32, and the reference (adapter off) online.

    packed   packed_logps on all pairs at once
    padded   two right-padded rows a pair, stock model under `sdpa`, head on the rows of the completions only
    TRL      the installed DPOTrainer's own compute_loss, one pair a batch

The two baselines take many times longer, so by default a random sample of pairs is timed, the same number at every
level, and the total is estimated: such rows say "sampled" and carry a 95 % interval. `--pairs-per-level 9` times every
pair. Before any timing, losses and gradients of one pair a level must agree between all three.

    python -m benchmarks.train_step [--model PATH] [--pairs-per-level 3] [--repeats 3] [--clock wall] [--no-trl]
"""

import argparse
import copy
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import CLOCKS, Check, InexactError, Timing, gate, record, show, stratified_total, timed
from cpo_kernels import preference_loss
from cpo_kernels.integrations.transformers import packed_logps, prepare
from cpo_kernels.tolerances import end_to_end_bound

PROMPT_TOKENS = 450
THOUGHT_TOKENS = (36, 44)  # inclusive
NUM_LEVELS, NUM_REJECTED = 3, 9
BETA = 0.1
LORA_RANK, LORA_TARGETS = 8, ["q_proj", "k_proj", "v_proj"]
BAR = 12.0  # packed must beat padded rows by at least this factor

Pair = tuple[list[int], list[int], list[int]]
Loss = Callable[[Sequence[Pair]], torch.Tensor]


def synthetic_tree(vocab_size: int, seed: int) -> dict[int, list[Pair]]:
    """Pairs (prompt, chosen, rejected) by level; every thought starts with a token of its own."""
    generator = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [generator.randrange(10, vocab_size) for _ in range(count)]

    path = ids(PROMPT_TOKENS)
    levels: dict[int, list[Pair]] = {}
    for level in range(1, NUM_LEVELS + 1):
        firsts = generator.sample(range(10, vocab_size), NUM_REJECTED + 1)
        thoughts = [[first, *ids(generator.randint(*THOUGHT_TOKENS) - 1)] for first in firsts]
        levels[level] = [(list(path), thoughts[0], rejected) for rejected in thoughts[1:]]
        path += thoughts[0]
    return levels


def lora_config() -> Any:
    """A fresh configuration: PEFT writes into the one it is given."""
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


def randomize_adapter(model: nn.Module) -> None:
    """The same non-zero A and B in every contestant: with B = 0 half of the gradient would be zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def sequences_of(pairs: Sequence[Pair]) -> tuple[list[list[int]], list[int]]:
    """Prompt + chosen, prompt + rejected of every pair in turn, and where each response starts."""
    sequences = [prompt + response for prompt, chosen, rejected in pairs for response in (chosen, rejected)]
    return sequences, [len(prompt) for prompt, _, _ in pairs for _ in range(2)]


def packed_loss(model: nn.Module) -> Loss:
    """Sum of the pairs' losses by one packed forward."""

    def loss(pairs: Sequence[Pair]) -> torch.Tensor:
        out = packed_logps(model, *sequences_of(pairs), reference="adapter_off")
        logps, reference = out.segment_logps, out.ref_segment_logps
        return preference_loss(logps[0::2], logps[1::2], reference[0::2], reference[1::2], beta=BETA).losses.sum()

    return loss


def padded_loss(model: nn.Module) -> Loss:
    """Sum of the pairs' losses, two right-padded rows a pair; causal attention needs no mask for padding there."""
    base = model.get_base_model()

    def logps(pair: Pair) -> torch.Tensor:
        prompt, chosen, rejected = pair
        rows = [torch.tensor(prompt + response) for response in (chosen, rejected)]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = base.model(input_ids=input_ids, use_cache=False).last_hidden_state
        sums = []
        for row, response in enumerate((chosen, rejected)):
            predicting = hidden[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
            sums.append(-F.cross_entropy(base.lm_head(predicting), torch.tensor(response), reduction="sum"))
        return torch.stack(sums)

    def loss(pairs: Sequence[Pair]) -> torch.Tensor:
        losses = []
        for pair in pairs:
            with torch.no_grad(), model.disable_adapter():
                reference = logps(pair)
            ratio = logps(pair) - reference
            losses.append(-F.logsigmoid(BETA * (ratio[0] - ratio[1])))
        return torch.stack(losses).sum()

    return loss


def trl_loss(base: nn.Module, tokenizer: Any, scratch: Path) -> tuple[nn.Module, Loss]:
    """The trainer's model, and the sum of the pairs' losses by its compute_loss, one pair a batch."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(scratch), use_cpu=True, bf16=False, beta=BETA, gradient_checkpointing=False, max_length=None,
            per_device_train_batch_size=1, report_to=[], disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )  # fmt: skip
    trainer.model.train()

    def loss(pairs: Sequence[Pair]) -> torch.Tensor:
        batches = [[dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True))] for pair in pairs]
        return torch.stack(
            [trainer.compute_loss(trainer.model, dict(trainer.data_collator(batch))) for batch in batches]
        ).sum()

    return trainer.model, loss


def step(model: nn.Module, loss: Loss, pairs: Sequence[Pair]) -> tuple[float, torch.Tensor]:
    """Forward and backward; returns the loss and every adapter gradient as one vector in the order of names."""
    model.zero_grad(set_to_none=True)
    value = loss(pairs)
    value.backward()
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return float(value.detach()), torch.cat([parameter.grad.flatten() for _, parameter in trained])


def exactness(contestants: dict[str, tuple[nn.Module, Loss]], pairs: Sequence[Pair]) -> list[Check]:
    """Loss and gradient of every contestant against `padded`."""
    bound = end_to_end_bound(torch.float32)
    want_loss, want_gradient = step(*contestants["padded"], pairs)
    checks = []
    for name, (model, loss) in contestants.items():
        if name != "padded":
            got_loss, got_gradient = step(model, loss, pairs)
            error = float((got_gradient - want_gradient).norm() / want_gradient.norm())
            checks += [
                Check(f"{name} loss", abs(got_loss - want_loss) / want_loss, bound),
                Check(f"{name} gradient", error, bound),
            ]
    return checks


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal language model; default: the demonstration model")
    parser.add_argument("--pairs-per-level", type=int, default=3, help="pairs timed at each level by the baselines")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of the packed step")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for a machine shared with others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--no-record", action="store_true", help="show only")
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.pairs_per_level <= NUM_REJECTED:
        parser.error(f"--pairs-per-level must lie between 2 and {NUM_REJECTED}")
    return arguments


def load_contestants(path: str, with_trl: bool, scratch: Path) -> dict[str, tuple[nn.Module, Loss]]:
    """One model and loss for each contestant, all with the same weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    contestants: dict[str, tuple[nn.Module, Loss]] = {}
    if with_trl:
        contestants["TRL"] = trl_loss(copy.deepcopy(base), AutoTokenizer.from_pretrained(path), scratch)
    padded = get_peft_model(copy.deepcopy(base), lora_config())
    contestants["padded"] = (padded, padded_loss(padded))
    packed = get_peft_model(base, lora_config())
    randomize_adapter(packed)
    contestants["packed"] = (prepare(packed), packed_loss(packed))
    for model, _ in contestants.values():
        randomize_adapter(model)
        model.train()
    return contestants


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, record and show; 1 when inexact or below the bar."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.model
    if path is None:
        from cpo_fast.demo.model import convert_demo_model

        path = str(convert_demo_model())
    with tempfile.TemporaryDirectory() as scratch:
        contestants = load_contestants(path, not arguments.no_trl, Path(scratch))
        levels = synthetic_tree(contestants["packed"][0].config.vocab_size, arguments.seed)
        checks = exactness(contestants, [pairs[0] for pairs in levels.values()])
        try:
            gate(checks)
        except InexactError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        packed, samples = time_all(contestants, levels, arguments)

    num_packed_tokens, num_padded_tokens = count_tokens(contestants["packed"][0], levels)
    results = summarize(packed, samples, {level: len(members) for level, members in levels.items()})
    results |= {
        "clock": arguments.clock,
        "model": Path(path).name,
        "packed_tokens": num_packed_tokens,
        "padded_tokens": num_padded_tokens,
    }
    if not arguments.no_record:
        command = " ".join(["python -m benchmarks.train_step", *(sys.argv[1:] if argv is None else argv)])
        record("train_step", command, checks, results)
    show_results(results, checks)
    ratio = results["baselines"]["padded"]["ratio_to_packed"]
    if ratio < BAR:
        sys.stderr.write(f"below the bar: {ratio:.1f} times packed, expected {BAR:.0f}\n")
        return 1
    return 0


def count_tokens(model: nn.Module, levels: dict[int, list[Pair]]) -> tuple[int, int]:
    """Tokens that the packed step computes, and tokens of the padded rows, padding included."""
    pairs = [pair for level in levels.values() for pair in level]
    with torch.no_grad():
        num_packed = packed_logps(model, *sequences_of(pairs)).num_tokens
    num_padded = sum(2 * (len(prompt) + max(len(chosen), len(rejected))) for prompt, chosen, rejected in pairs)
    return num_packed, num_padded


def time_all(
    contestants: dict[str, tuple[nn.Module, Loss]], levels: dict[int, list[Pair]], arguments: argparse.Namespace
) -> tuple[Timing, dict[str, dict[int, list[float]]]]:
    """Interleave packed steps with single pairs of the baselines; returns packed seconds and samples by level.

    The exactness check has run every contestant once, so the baselines are warm; the packed step runs once more
    unmeasured, since its full size is new to the allocator.
    """
    everything = [pair for level in levels.values() for pair in level]
    packed_model, packed = contestants["packed"]
    baselines = {name: contestant for name, contestant in contestants.items() if name != "packed"}
    generator = random.Random(arguments.seed + 1)
    chosen = {level: generator.sample(pairs, arguments.pairs_per_level) for level, pairs in levels.items()}
    samples: dict[str, dict[int, list[float]]] = {name: {level: [] for level in levels} for name in baselines}
    packed_seconds: list[float] = []
    timed(lambda: step(packed_model, packed, everything))
    for round_index in range(max(arguments.pairs_per_level, arguments.repeats)):
        if round_index < arguments.repeats:
            packed_seconds.append(timed(lambda: step(packed_model, packed, everything), arguments.clock))
        if round_index < arguments.pairs_per_level:
            for level, pairs in chosen.items():
                for name, (model, loss) in baselines.items():
                    pair = pairs[round_index]
                    samples[name][level].append(timed(lambda m=model, f=loss, p=pair: step(m, f, [p]), arguments.clock))
    return Timing(tuple(packed_seconds)), samples


def summarize(packed: Timing, samples: dict[str, dict[int, list[float]]], sizes: dict[int, int]) -> dict[str, Any]:
    """Seconds of the packed step; estimated total, ratio and intervals of every baseline."""
    baselines = {}
    for name, by_level in samples.items():
        estimate = stratified_total(by_level, sizes)
        interval = (estimate.low, estimate.high)
        baselines[name] = {
            "sampled": estimate.num_sampled < estimate.num_total,
            "num_sampled": estimate.num_sampled,
            "seconds_by_level": by_level,
            "total_seconds": estimate.total,
            "interval_seconds": interval,
            "ratio_to_packed": estimate.total / packed.median,
            "ratio_interval": [seconds / packed.median for seconds in interval],
        }
    return {
        "num_pairs": sum(sizes.values()),
        "packed_seconds": list(packed.seconds),
        "packed_median_seconds": packed.median,
        "packed_spread": packed.spread,
        "baselines": baselines,
    }


def show_results(results: dict[str, Any], checks: Sequence[Check]) -> None:
    """The table: tokens, seconds and ratios, with what was sampled said in the row."""
    rows = [
        [
            "packed",
            f"{results['packed_tokens']:,}",
            f"{results['packed_median_seconds']:.2f}",
            f"median of {len(results['packed_seconds'])}",
            "1.0",
        ]
    ]
    for name, row in results["baselines"].items():
        (low, high), (ratio_low, ratio_high) = row["interval_seconds"], row["ratio_interval"]
        sampled = "sampled, " if row["sampled"] else ""
        rows.append(
            [
                name,
                f"{results['padded_tokens']:,}",
                f"{row['total_seconds']:.1f} [{low:.1f}, {high:.1f}]",
                f"{sampled}{row['num_sampled']} of {results['num_pairs']} pairs",
                f"{row['ratio_to_packed']:.1f} [{ratio_low:.1f}, {ratio_high:.1f}]",
            ]
        )
    agreed = ", ".join(f"{check.name} {check.error:.1e}" for check in checks)
    show(
        f"One step of {results['num_pairs']} pairs: policy forward and backward, online reference, fp32",
        ["variant", "tokens", f"{results['clock']} seconds", "measured", "times packed"],
        rows,
        f"{results['padded_tokens'] / results['packed_tokens']:.1f} times fewer tokens. Agreement with padded before "
        f"timing: {agreed}. Spread of packed {results['packed_spread']:.0%}; intervals 95 %; "
        f"{torch.get_num_threads()} threads.",
    )


if __name__ == "__main__":
    sys.exit(main())
