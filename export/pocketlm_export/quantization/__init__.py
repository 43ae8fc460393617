"""Weights to integers and scales: rows of schemes, the rules that choose scales, and the store of the results."""
