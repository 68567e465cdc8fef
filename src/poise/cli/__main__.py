"""``python -m poise.cli``."""

from poise.cli.main import main

main()
