"""What reading one file may take."""

__all__ = ["LARGEST_FILE", "LONGEST_SECONDS", "MOST_MEGABYTES"]

LONGEST_SECONDS = 20  # a template may take five by its own budget, and CI machines are slow
MOST_MEGABYTES = 2048
LARGEST_FILE = 1 << 17
