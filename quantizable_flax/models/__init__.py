"""Models, each with its loss, and the place that builds them from a configuration."""
