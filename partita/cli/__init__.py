"""The command line: one verb a file; main.py imports only the verb that is asked for."""
