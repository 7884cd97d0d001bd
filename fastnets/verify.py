"""``python -m fastnets.verify``: see ``fastnets.bench.verify``."""

from fastnets.bench.verify import main

if __name__ == "__main__":
    main()
