"""The names and configurations of the Hugging Face layouts, read and written."""
