"""A page that shows what a comparison of patterns measured: `write_report`, and `save_results` for the numbers."""

from chronotope.report.page import save_results, write_report

__all__ = ["save_results", "write_report"]
