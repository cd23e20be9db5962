"""Import from the modules of this folder; this file is empty on purpose."""
