"""Random sequences that share prefixes, for tests of what is made of their forest."""

import random


def random_sequences(
    seed: int, num_prompts: int = 2, num_sequences: int = 12, vocab_size: int = 50, max_tokens: int = 24
) -> tuple[list[list[int]], list[int]]:
    """Random sequences with shared prefixes at several levels, and the first scored position of each.

    Siblings diverge at their first token as often as later, some are prefixes of others, some are equal, and single-token
    responses occur.
    """
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(1, vocab_size) for _ in range(generator.randint(low, high))]

    shared = tokens(1, max_tokens)
    contexts = [shared + tokens(1, max_tokens) for _ in range(num_prompts)]
    sequences: list[list[int]] = []
    starts: list[int] = []
    for _ in range(num_sequences):
        context = generator.choice(contexts)
        response = tokens(1, max_tokens)
        if sequences and generator.random() < 0.2:
            response = sequences[-1][starts[-1] :][: generator.randint(1, max_tokens)] or response
        sequences.append(context + response)
        starts.append(len(context))
        if generator.random() < 0.5:
            contexts.append(context + response)
    return sequences, starts
