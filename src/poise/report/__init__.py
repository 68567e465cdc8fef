"""One self-contained HTML file a comparison: pictures first, every number in the table."""

from poise.report.page import write_report, write_verdict

__all__ = ["write_report", "write_verdict"]
