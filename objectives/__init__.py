"""Rewards and losses: pure functions of tensors."""
