"""A Dask cluster that is already there: how it is opened and checked, and what runs on it."""
