"""Training. One loop; what it trains on and with comes from a recipe."""
