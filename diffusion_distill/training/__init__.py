"""Training: state, one jitted step, averages, optimizer, devices, checkpoints, and the loop around them."""
