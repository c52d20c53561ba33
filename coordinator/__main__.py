"""`python -m coordinator` is `buildmill`."""

from coordinator.cli.main import main

if __name__ == "__main__":
    main()
