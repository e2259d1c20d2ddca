"""All methods side by side on the bundled teacher: what `stepfold compare` runs."""
