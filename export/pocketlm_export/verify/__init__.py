"""What an artifact is held against."""
