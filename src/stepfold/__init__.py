"""stepfold folds a diffusion model's many sampling steps into one, from prompts alone."""

__version__ = "0.2.0"
