"""PEFT's adapter folder: save, load, read, write, inspect, verify, repair and push."""
