"""What is measured of a policy."""
