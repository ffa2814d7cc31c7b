"""What is timed, each against a named reference in the same run."""
