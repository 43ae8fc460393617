"""Weights to integers and scales: rows of schemes, the rules that choose scales, and the store that keeps the result."""
