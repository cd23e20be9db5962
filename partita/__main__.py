"""`python -m partita`."""

from partita.cli.entry import main

if __name__ == "__main__":
    main()
