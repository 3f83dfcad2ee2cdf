"""Wrong backends, each with one mistake, and what is done with them: self-test, diagnosis, blind mutation."""
