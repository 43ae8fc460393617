"""One model as one graph: written down once, rewritten for all backends alike, lowered by each."""
