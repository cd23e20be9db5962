"""Errors that teach, units, text and tables, strict TOML."""
