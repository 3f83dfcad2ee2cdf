"""A report shown on a terminal, and written as JSON, JUnit XML and one HTML page."""
