"""What a model costs before you pay for it: pure arithmetic and simulation, no torch (except to measure the machine)."""
