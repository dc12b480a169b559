"""Arrays and their axes: patterns, layouts, regions of sharded arrays, placement, quantised weights, low-rank
products.
"""
