"""`python -m momkd` and `torchrun -m momkd`: the command line."""

from momkd.cli import main

if __name__ == "__main__":
    main()
