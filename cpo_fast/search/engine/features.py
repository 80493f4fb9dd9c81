"""What makes the arena engine fast, each of which a measurement can switch off. None of them changes a result."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Features:
    """Switches of one engine.

    Attributes:
        share: a node that rows share is read once for all of them; off: once for each row.
        refill: places of finished rows are filled while others still run; off: when all have ended.
        graphs: steps of generation are recorded and replayed, and read back one step late. Needs CUDA.
    """

    share: bool = True
    refill: bool = True
    graphs: bool = False
