"""What a recipe will do, worked out before anything trains."""
