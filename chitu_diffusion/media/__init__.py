"""Videos in files."""
