"""From states and networks' outputs to a loss of each state; one objective a file."""
