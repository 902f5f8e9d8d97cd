"""What can go wrong with a run that is not its input: signals, disks, damaged checkpoints; and how a command ends."""
