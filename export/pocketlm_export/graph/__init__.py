"""One model as one graph: traced once, rewritten for all backends alike, lowered by each."""
