"""What each verb of the loop reads and writes."""
