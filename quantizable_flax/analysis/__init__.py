"""Outlier statistics and the report."""
