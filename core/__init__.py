"""What the recipes build on, one subject a file. Nothing here imports common.py or a recipe."""
