"""The commands, one file each or one a family: its options and its job."""
