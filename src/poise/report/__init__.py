"""One self-contained HTML file a comparison: pictures first, every number in the table."""

from poise.report.page import write_report

__all__ = ["write_report"]
