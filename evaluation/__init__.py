"""What comes out: scores, distances between image sets, the report."""
