"""The test suite: `python -m unittest discover tests`, offline, a few minutes on two cores."""
