"""Speed lives here: one registry of shapes (shapes), one way to time (timing), and the commands built on them."""
