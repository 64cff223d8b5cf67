"""From scans to the padded batches of joint training."""
