"""What stands behind the recipes, one subject a file. Nothing here imports common.py or a recipe."""
