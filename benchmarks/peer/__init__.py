"""Trainers that others wrote, each behind :class:`peer.protocol.Adapter`, a file each; and what they all train on."""
