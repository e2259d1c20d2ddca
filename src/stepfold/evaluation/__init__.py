"""How good a sampler is: the judge, its metrics, the frozen protocol and the report."""
