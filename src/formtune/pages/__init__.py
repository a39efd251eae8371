"""What the HTML pages of audit, sweep and report share."""
