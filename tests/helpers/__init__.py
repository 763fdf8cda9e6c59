"""What tests share: commands, tiny models and data, steps that processes of their own run."""
