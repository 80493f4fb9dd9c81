"""What is written beside the tiles of a table, read from the source: `make aot` holds the machine code to it."""

import re

from tests.cpo_kernels.machine_code import Reach

ARCHITECTURE = re.compile(r"^    (\d+): \{$")
ROW = re.compile(r"^        (?P<head_dim>\d+): Tile\(.*\),(?P<comment>.*)$")
BESIDE = re.compile(r"#\s*(?P<percent>\d+) %, (?P<blocks>\d+) blocks?, (?P<registers>\d+) registers$")


def written_beside(source: str, table: str) -> dict[tuple[int, int], Reach]:
    """Share of the matrix peak, blocks and registers, by architecture and padded head size.

    Args:
        source: text of the module that has `table`, tiles by head size by architecture, a line each.

    Raises:
        ValueError: a tile has nothing of this form beside it, or there is no tile.
    """
    found: dict[tuple[int, int], Reach] = {}
    arch = 0
    for line in source.split(f"\n{table} = {{\n")[-1].split("\n}\n")[0].splitlines():
        if header := ARCHITECTURE.match(line):
            arch = int(header[1])
        elif row := ROW.match(line):
            beside = BESIDE.search(row["comment"])
            if beside is None:
                raise ValueError(f"{table}: expected '# 80 %, 2 blocks, 255 registers' beside {line!r}")
            found[arch, int(row["head_dim"])] = Reach(*map(int, beside.groups()))
    if not found:
        raise ValueError(f"{table}: no tiles found")
    return found
