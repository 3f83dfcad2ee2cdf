"""The exam: questions, laws that ask them, subjects that answer, and the verdicts."""
