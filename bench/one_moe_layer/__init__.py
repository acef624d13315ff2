"""One MoE layer, calibrated and exported by two programs (`bench/vs_modelopt.py`)."""
