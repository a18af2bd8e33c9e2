"""One HTML file of an evaluation, with everything in it."""
