"""The command line: one file a command, each imported by ``main`` and importing what is heavy only when it runs."""
