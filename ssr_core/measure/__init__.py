"""Measuring: hooks on a running model, and the sums behind them."""
