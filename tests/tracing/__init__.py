"""torch.compile and export."""
