"""The demo in the browser: what it does (`actions.py`), and its page (`page.py`)."""
