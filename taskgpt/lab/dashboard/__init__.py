"""A run while it runs: live.py takes its records, page.py draws them, dashboard.py serves that beside Dask's own pages."""
