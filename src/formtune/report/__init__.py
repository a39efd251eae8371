"""Optional: the report and model card of a run, and paired comparisons of runs."""
