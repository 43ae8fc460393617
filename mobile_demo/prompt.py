def read_lines(path):
    """Return the lines of a file as a list of strings."""
