"""`liftbyimage bench-report`: what `pytest bench --benchmark-json=FILE` measured, as tables, figures and data."""
