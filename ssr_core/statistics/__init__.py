"""What is measured: sums over tokens, and all of them together as a calibration. Values only."""
