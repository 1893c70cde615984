"""What one further method needs beyond the parts, one small file each. Nothing else imports it."""
