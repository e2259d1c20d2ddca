"""What commands and the Python API share: a run from settings to files, its samples, its exports."""
