"""The work of each verb of the loop: the files that it reads and writes."""
