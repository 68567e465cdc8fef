"""Foreign engines: one file each reads its dumps and writes its placement."""
