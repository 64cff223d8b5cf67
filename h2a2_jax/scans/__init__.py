"""From files or generators to the padded batches of joint training."""
