"""What answers say about a model: rows kept one by one, intervals, paired tests, slices, reports. Needs no torch."""
