"""`python -m cpo_fast` is `cpo-fast`."""

from cpo_fast.cli import main

main()
