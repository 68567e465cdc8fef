"""The version of poise, for modules that import nothing else."""

VERSION = "0.2.0"
