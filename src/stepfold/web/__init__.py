"""The page of `stepfold demo`. `page.py` and `training_tab.py` know gradio; the other files give it pictures, numbers and texts."""
