"""Records what a session was fed and answered, and judges what other runtimes and devices make of it."""
