"""Where training states come from; one sample space a file."""
