"""The price of every decision, and the order of units."""
