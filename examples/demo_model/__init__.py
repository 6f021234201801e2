"""The demo model: what it learns (questions.json) and how (train.py)."""
