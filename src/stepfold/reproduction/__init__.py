"""The paper's comparisons, run again: experiments, their runs, the page with the verdicts."""
