"""What `formtune init` guesses from rows, and the estimates of `--dry_run`. Optional; only plan.py needs torch."""
