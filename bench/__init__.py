"""Measuring, counting and inspecting: the benchmark core, its baselines and reports, the traffic counter."""
