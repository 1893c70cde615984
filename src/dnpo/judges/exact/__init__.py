"""Judges that check responses against a verifiable answer."""
