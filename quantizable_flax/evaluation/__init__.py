"""Metrics, outliers, the study of a run, tables."""
