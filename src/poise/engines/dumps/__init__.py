"""Readers of what engines write: one format a file, containers and limits beneath them."""
