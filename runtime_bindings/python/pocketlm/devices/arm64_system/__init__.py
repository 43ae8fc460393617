"""An arm64 system in the user's cache, made from Debian's and PyPI's packages, and the emulator that runs it."""
