"""The paper's claims, measured on the paper people: `python -m benchmarks.results` (see __main__.py)."""
