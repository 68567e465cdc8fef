"""``python -m poise``."""

from poise.cli.main import main

main()
