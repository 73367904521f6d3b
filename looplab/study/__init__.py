"""`looped study NAME`: arms that are trained over seeds, rows that are kept, and tables drawn from the rows alone."""
