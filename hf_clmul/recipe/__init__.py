"""The recipe: from YAML to frozen types, with every mistake found at once."""
