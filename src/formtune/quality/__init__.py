"""What whole sets of rows show: near-duplicates and mixed styles. Optional: without it, only equal inputs are found."""
