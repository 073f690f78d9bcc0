"""halfbyte version."""

import halfbyte


def version() -> None:
    """Print the version."""
    print(halfbyte.__version__)
