"""Measures bundles on devices, and holds one measurement against another."""
