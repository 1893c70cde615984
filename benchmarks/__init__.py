"""Speed and memory, against the obvious implementation and against TRL. One command each; see README.md."""
