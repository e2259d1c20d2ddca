"""The page of `stepfold demo`. `page.py` and `training_tab.py` alone know gradio; others give pictures and texts."""
