"""The frozen side: schedules, DDIM, truncated rollouts, backbones. Nothing here knows Lightning."""
