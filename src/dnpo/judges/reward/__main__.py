"""``python -m dnpo.judges.reward``: see :mod:`dnpo.judges.reward.reward`."""

from dnpo.judges.reward.reward import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
