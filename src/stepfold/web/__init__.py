"""The page of `stepfold demo`. Only `page.py` knows gradio; the other files give it pictures, numbers and texts."""
