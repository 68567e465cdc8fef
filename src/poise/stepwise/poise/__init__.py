"""The policy of this project."""
