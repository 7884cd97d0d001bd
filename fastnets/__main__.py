"""``python -m fastnets`` is the ``fastnets`` command."""

from fastnets.cli import main

main()
