"""What quantization costs: evaluation text through the layers, in BF16 and as a server has it."""
