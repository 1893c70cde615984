"""Code that a further method needs in addition to the parts, one small file for each; nothing else imports it."""
