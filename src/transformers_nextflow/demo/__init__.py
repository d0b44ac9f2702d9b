"""The demo in the browser: its actions (`actions.py`) and its page (`page.py`)."""
