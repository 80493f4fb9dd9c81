"""`python -m cpo_fast.cli.agent`: what `cpo-fast train --hosts` starts on another host (see `cpo_fast.launch`)."""

import sys

from cpo_fast.cli import guarded
from cpo_fast.launch import obey

if __name__ == "__main__":
    sys.exit(guarded(lambda: obey(iter(sys.stdin))))
