"""The report: one checked dict, and its HTML, Markdown, JSON, plot and terminal forms."""
