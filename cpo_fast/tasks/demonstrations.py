"""Worked examples under one instruction, in the written order or in an order drawn from a seed.

The order comes from hashes and not from a random generator, so that it is the same on every version and machine: equal
seeds give equal prompts, byte for byte.
"""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Demonstrations:
    """What stands before every question: `instruction`, then `examples`, each a block of lines without a blank one."""

    instruction: str
    examples: tuple[str, ...]

    def text(self, seed: int | None = None) -> str:
        """Instruction and examples, a blank line after each; `seed` None keeps the written order."""
        return "".join(f"{block}\n\n" for block in (self.instruction, *self.ordered(seed)))

    def ordered(self, seed: int | None) -> tuple[str, ...]:
        """The examples in the order of the seed."""
        if seed is None:
            return self.examples
        keys = {example: hashlib.sha256(f"{seed}/{example}".encode()).digest() for example in self.examples}
        return tuple(sorted(self.examples, key=keys.__getitem__))
