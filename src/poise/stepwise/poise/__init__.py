"""The policy of this project: :mod:`~poise.stepwise.poise.policy` says which of three runs."""
