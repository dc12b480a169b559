"""Arrays and their axes: patterns, file layouts, regions, placement, quantization, low-rank products."""
