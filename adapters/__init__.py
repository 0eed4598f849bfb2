"""Frameworks: each module converts, calls and saves, and holds no maths."""
