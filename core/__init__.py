"""What the recipes build on, one topic per file. Nothing here imports common.py or a recipe."""
