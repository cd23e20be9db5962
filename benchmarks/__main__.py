"""`python -m benchmarks`: see run.py, whose functions other processes import by name."""

from benchmarks.run import main

if __name__ == "__main__":
    main()
