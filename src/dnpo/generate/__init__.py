"""How a policy answers prompts."""
