"""Reads a written package: bytes, statements and runs. Nothing here knows the writer."""
