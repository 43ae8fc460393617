"""What reading one file may take."""

__all__ = ["LARGEST_FILE", "LONGEST_SECONDS", "MOST_MEGABYTES"]

LONGEST_SECONDS = 10  # twice what a template may take by its own budget
MOST_MEGABYTES = 2048
LARGEST_FILE = 1 << 17
