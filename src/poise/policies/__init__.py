"""Fast loop: pure functions from the loads of one step to a token split."""
