"""`python -m tta`: the same as the `tta` command."""

from tta.commands import main

main()
