"""Pairs to groups that fit one forest of `train.max_tokens` tokens; a pair that never fits is named by its row."""

from collections.abc import Sequence

from cpo_fast.data.pair import PreferencePair
from cpo_fast.data.sft import SftExample
from cpo_fast.errors import DataError
from cpo_fast.tasks import common_prefix_length
from cpo_kernels.integrations.transformers import split_pairs


def group_pairs(pairs: Sequence[PreferencePair], max_tokens: int) -> list[list[PreferencePair]]:
    """Cut pairs into micro-batches whose forests have at most `max_tokens` tokens.

    Raises:
        DataError: a pair alone has more; names its row and the option.
    """
    for pair in pairs:
        common = common_prefix_length(pair.chosen_ids, pair.rejected_ids)
        num_tokens = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) - common
        if num_tokens > max_tokens:
            raise DataError(
                f"{pair.source}: the pair alone has {num_tokens} tokens, more than train.max_tokens={max_tokens}; "
                "raise the budget or set data.max_length to drop such rows"
            )
    triples = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    return [[pairs[index] for index in indices] for indices in split_pairs(triples, max_tokens)]


def group_examples(examples: Sequence[SftExample], max_tokens: int) -> list[list[SftExample]]:
    """Cut completions into micro-batches whose forests have at most `max_tokens` tokens.

    Raises:
        DataError: a completion with its prompt alone has more; names its row and the option.
    """
    for example in examples:
        num_tokens = len(example.prompt_ids) + len(example.completion_ids)
        if num_tokens > max_tokens:
            raise DataError(
                f"{example.source}: the row has {num_tokens} tokens, more than train.max_tokens={max_tokens}; "
                "raise the budget or set data.max_length to drop such rows"
            )
    # a completion is a pair whose two responses are one: equal sequences share every row
    triples = [(example.prompt_ids, example.completion_ids, example.completion_ids) for example in examples]
    return [[examples[index] for index in indices] for indices in split_pairs(triples, max_tokens)]
