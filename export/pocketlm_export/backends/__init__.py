"""One folder a backend, none of which knows another. ``base`` is the contract, ``null`` the smallest that keeps it."""
