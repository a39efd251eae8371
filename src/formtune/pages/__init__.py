"""Pages and files from templates, for audit, sweep, report and export."""
