"""``python -m stableavatar``: the command line, for where its script is not on the path."""

from stableavatar.apps.cli import main

main()
