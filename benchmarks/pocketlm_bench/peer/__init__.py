"""What PocketLM is compared with, each in an environment of its own.

Modules named after a peer, and gguf_file, run in that peer's environment, which has no pocketlm: they import the
standard library, numpy and the peer, and of this package only ``rates``.
"""
