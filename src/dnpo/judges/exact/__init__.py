"""Judges that compare with a verifiable answer."""
