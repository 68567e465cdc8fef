"""Sections of the report, one a file: ``section(view)`` gives HTML, or nothing where it does not apply."""
