"""Number formats: one file and one row of a table each."""
