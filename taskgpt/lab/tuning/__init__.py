"""Tuning: tilings.py finds tile sizes worth a try and forecasts their times, races.py finds the fastest, tuned.py keeps it."""
