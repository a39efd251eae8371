"""From a trained adapter to what production loads: checked, merged, quantised, and told apart by its manifest."""
